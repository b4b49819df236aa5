"""Options as text: YAML in, one-line errors out. It knows pydantic, but no option by name."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from papo.errors import PapoError, first_line


class ConfigError(PapoError):
    """A bad option, in one line: the key, its value and what was expected."""


class _Loader(yaml.SafeLoader):
    """Reads floats as YAML 1.2 does (`1e-5` is a number) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((k for i, k in enumerate(keys) if k in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"  # PyYAML looks for no end of its own
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document.

    Raises:
        ConfigError: it does not parse, or gives a key twice; the message has `where` and the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from error
    except (ValueError, AttributeError) as error:  # a date or a number that PyYAML cannot make
        raise ConfigError(f"{where}: not valid YAML: {first_line(error)}") from error


def sections_of(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """(name, model) of each nested section."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key, sections included."""
    nested = dict(sections_of(model))
    keys = []
    for name in model.model_fields:
        keys.append(prefix + name)
        if name in nested:
            keys += known_keys(nested[name], f"{prefix}{name}.")
    return keys


def nearest_key(key: str, model: type[BaseModel]) -> str | None:
    """The known key that `key` most likely stands for: one of the same name in another section,
    else the one spelled most alike."""
    known = known_keys(model)
    leaf = key.rpartition(".")[2]
    elsewhere = [k for k in known if k.rpartition(".")[2] == leaf]
    if elsewhere:
        return elsewhere[0]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if close:
        return close[0]
    by_leaf = {k.rpartition(".")[2]: k for k in reversed(known)}
    close = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)
    return by_leaf[close[0]] if close else None


def explain(errors: Sequence[ErrorDetails], model: type[BaseModel]) -> list[str]:
    """Validation errors as lines, one per key: the key, its value and what was expected."""
    found: dict[str, ErrorDetails] = {}
    wanted: dict[str, list[str]] = {}
    for error in errors:
        key = _dotted(error["loc"], model)
        found.setdefault(key, error)
        # Each branch of a union reports its own expectation: one line gives them all.
        wanted.setdefault(key, []).append(_expected(error, key, model))
    return [
        _line(key, error, " or ".join(dict.fromkeys(wanted[key])), model)
        for key, error in found.items()
    ]


def _line(key: str, error: ErrorDetails, expected: str, model: type[BaseModel]) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    value = _short(error["input"])
    if error["type"] == "extra_forbidden":
        near = nearest_key(key, model)
        advice = (
            f"did you mean {near}?" if near else f"known here: {', '.join(_siblings(key, model))}"
        )
        return f"{key}={value}: unknown key; {advice}"
    if error["type"] == "missing":
        return f"{key} is missing: {_description(key, model)}"
    return f"{key}={value}: expected {expected}"


def _expected(error: ErrorDetails, key: str, model: type[BaseModel]) -> str:
    if error["type"] in ("model_type", "dict_type"):
        return "a section with keys"
    if error["type"] == "string_pattern_mismatch":
        return _description(key, model)
    return error["msg"].removeprefix("Input should be ").removeprefix("a valid ")


def _siblings(key: str, model: type[BaseModel]) -> list[str]:
    for name in key.split(".")[:-1]:
        model = dict(sections_of(model))[name]
    return list(model.model_fields)


def _dotted(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The dotted key of an error's location, without the parts that pydantic adds for a union."""
    key = ""
    current: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int):
            return f"{key}[{part}]"
        if current is None:
            break
        key = f"{key}.{part}" if key else part
        current = dict(sections_of(current)).get(part)
    return key


def _description(key: str, model: type[BaseModel]) -> str:
    *path, leaf = key.partition("[")[0].split(".")
    for name in path:
        model = dict(sections_of(model))[name]
    field = model.model_fields[leaf]
    nested = dict(sections_of(model)).get(leaf)
    return one_line(field.description or (nested.__doc__ if nested else "") or "")


def one_line(text: str) -> str:
    """`text` with every run of white space as one space."""
    return " ".join(text.split())


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`, mapping by mapping; neither argument is changed."""
    result = copy.deepcopy(dict(under))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def read_options(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML file with `a.b=value` overrides laid on it, each value read as YAML.

    Raises:
        ConfigError: the file cannot be read or holds no mapping, or an override has another form.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--config {path}: cannot be read: {reason}") from error
    options = parse_yaml(text, str(path))
    if not isinstance(options, dict):
        raise ConfigError(f"{path}: expected a mapping of options, got {type(options).__name__}")
    for override in overrides:
        _override(options, override)
    return options


def _override(options: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: expected section.key=value")
    section = options
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {part} is not a section")
    section[parts[-1]] = parse_yaml(text, f"--set {override}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
