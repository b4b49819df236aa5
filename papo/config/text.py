"""Options as text: YAML in, one-line errors out. It knows pydantic, but no option by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from papo.config.parse import DEEPEST, ConfigError, parse_value, parse_yaml
from papo.errors import printable, shown, shown_path
from papo.inputs import is_plain, read_text

_LARGEST_FILE = 1 << 20
_LONGEST_KEY = 60


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
    if len(key) > _LONGEST_KEY:
        return None
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


def explain(errors: Sequence[ErrorDetails], model: type[BaseModel]) -> str:
    """Validation errors as one line: the first key, its value, what was expected, and how many
    more there are."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        by_key.setdefault(_dotted(error["loc"], model), []).append(error)
    key, found = next(iter(by_key.items()))
    # Each branch of a union reports its own expectation: one line gives them all.
    expected = dict.fromkeys(_expected(error, key, model) for error in found)
    more = f" (and {len(by_key) - 1} more)" if len(by_key) > 1 else ""
    return _line(key, found[0], " or ".join(expected), model) + more


def _line(key: str, error: ErrorDetails, expected: str, model: type[BaseModel]) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    told = f"{printable(key, _LONGEST_KEY)}={shown(error['input'])}"
    if error["type"] == "extra_forbidden":
        near = nearest_key(key, model)
        advice = (
            f"did you mean {near}?" if near else f"known here: {', '.join(_siblings(key, model))}"
        )
        return f"{told}: unknown key; {advice}"
    if error["type"] == "missing":
        return f"{key} is missing: {_description(key, model)}"
    return f"{told}: expected {expected}"


def _expected(error: ErrorDetails, key: str, model: type[BaseModel]) -> str:
    kind = error["type"]
    if kind in ("model_type", "dict_type"):
        return "a section with keys"
    if kind == "string_pattern_mismatch":
        return _description(key, model)
    if kind == "string_unicode":
        return "text without half a surrogate pair"
    words, limit = error["msg"], next(iter(error.get("ctx", {}).values()), None)
    if isinstance(limit, float) and kind.startswith(("less_than", "greater_than")):
        words = f"{words[: words.rindex(' ')]} {limit:g}"  # pydantic writes 1e30 out
    for beginning in ("Input should be ", "String should have ", "a valid "):
        words = words.removeprefix(beginning)
    return words


def _siblings(key: str, model: type[BaseModel]) -> list[str]:
    for name in key.split(".")[:-1]:  # an unknown key may have dots of its own
        model = dict(sections_of(model)).get(name, model)
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
    return unwrapped(field.description or (nested.__doc__ if nested else "") or "")


def unwrapped(text: str) -> str:
    """`text` with every run of white space as one space."""
    return " ".join(text.split())


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`, mapping by mapping; neither argument is changed."""
    result = {k: merged(v, {}) if isinstance(v, Mapping) else v for k, v in under.items()}
    for key, value in over.items():
        if isinstance(value, Mapping):
            below = result.get(key)
            value = merged(below if isinstance(below, Mapping) else {}, value)
        result[key] = value
    return result


def read_options(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML file with `a.b=value` overrides laid on it, each value read as YAML.

    Raises:
        ConfigError: the file cannot be read or holds no mapping, or an override has another form.
    """
    name = shown_path(path)
    try:
        text = read_text(path, _LARGEST_FILE)
    except ValueError as error:
        raise ConfigError(f"--config {name}: cannot be read: {error}") from error
    options = parse_yaml(text, name)
    if options is None:
        raise ConfigError(f"{name}: expected a mapping of options, got an empty document")
    if not isinstance(options, dict):
        raise ConfigError(f"{name}: expected a mapping of options, got {type(options).__name__}")
    for override in overrides:
        _override(options, override)
    return options


def _override(options: dict[str, Any], override: str) -> None:
    told = f"--set {printable(override)}"
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > DEEPEST or not is_plain(key):
        raise ConfigError(f"{told}: expected section.key=value")
    section = options
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{told}: {printable(part)} is not a section")
    section[parts[-1]] = parse_value(text, told)
