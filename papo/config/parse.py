"""YAML from and to plain values: the types of JSON, in bounded number, size and depth."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError

from papo.errors import PapoError, first_line, shown
from papo.inputs import is_plain

# An alias stands for all of its anchor's values again: ten lines can name more than memory holds.
_MOST_VALUES = 10_000
DEEPEST = 32
_LONGEST_NUMBER = 60


class ConfigError(PapoError):
    """A bad option, in one line: the key, its value and what was expected."""


class _Loader(yaml.SafeLoader):
    """Reads what JSON can hold: no tags, no dates, text keys, none of them twice.

    Numbers are those of YAML 1.2 (`1e-5` is one, `010` and `1:30` are text), of at most 60
    characters; what is longer stays text, which no option takes for a number.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # its own, not SafeLoader's

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise ComposerError(
                None, None, f"expected no tag, got {_tag_text(event.tag)}", event.start_mark
            )
        if self._depth > DEEPEST:
            raise ComposerError(None, None, f"nested more than {DEEPEST} deep", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        known = self._sizes.get(id(node))
        if known is None and isinstance(event, yaml.AliasEvent):
            raise ComposerError(None, None, "an anchor holds itself", event.start_mark)
        size = self._sizes[id(node)] = known or 1 + sum(
            self._sizes[id(child)] for child in _children(node)
        )
        if size > _MOST_VALUES or len(self._sizes) > _MOST_VALUES:
            raise ComposerError(
                None, None, f"expected at most {_MOST_VALUES} values", event.start_mark
            )
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        return node


def _check_keys(node: yaml.MappingNode) -> None:
    """Refuse keys that are no text, and a key given twice."""
    seen: set[str] = set()
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        name = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
        if key.tag != "tag:yaml.org,2002:str":
            raise ComposerError(
                None, None, f"key {shown(name)}: expected text, in quotes", key.start_mark
            )
        if not is_plain(name):
            raise ComposerError(
                None, None, f"key {shown(name)}: NUL or half a surrogate pair", key.start_mark
            )
        if name in seen:
            raise ComposerError(None, None, f"key {shown(name)} is given twice", key.start_mark)
        seen.add(name)


def _tag_text(tag: str) -> str:
    return shown(tag.replace("tag:yaml.org,2002:", "!!"))


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


class _Dumper(yaml.SafeDumper):
    """Quotes text that this loader, or one of YAML 1.1, would take for something else."""


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (
        "bool",
        r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
        "yYnNtTfFoO",
    ),
    ("int", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
):
    _whole = re.compile(rf"(?=.{{0,{_LONGEST_NUMBER}}}\Z)({_pattern})\Z")  # PyYAML seeks no end
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _whole, list(_first))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document; no two parts of it are the same object.

    Raises:
        ConfigError: it does not parse, holds what JSON cannot, gives a key twice, or is too large;
            the message has `where` and the line.
    """
    try:
        return _unshared(yaml.load(text, _Loader))
    except yaml.reader.ReaderError as error:
        line = f" line {text.count(chr(10), 0, error.position) + 1}"
        raise ConfigError(
            f"{where}{line}: not valid YAML: character {shown(chr(error.character))} in it"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        problem = error.problem or "it does not parse"
        if problem.startswith("but ") and error.context:
            problem = f"{error.context} {problem}"
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a character beyond Unicode
        raise ConfigError(f"{where}: not valid YAML: {first_line(error)}") from error


def parse_value(text: str, where: str) -> Any:
    """The value of an override, of which YAML would take a part for a comment or for an anchor.

    Raises:
        ConfigError: as `parse_yaml`, or there is such a part.
    """
    value = parse_yaml(text, where)
    *tokens, _ = yaml.scan(text, yaml.SafeLoader)
    named = any(isinstance(token, (yaml.AnchorToken, yaml.AliasToken)) for token in tokens)
    if named or text[tokens[-1].end_mark.index :].strip():
        what = "an anchor" if named else "a comment"
        raise ConfigError(f"{where}: YAML takes a part of it for {what}: put the value in quotes")
    return value


def yaml_text(value: Any) -> str:
    """A YAML document that `parse_yaml` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def _unshared(value: Any) -> Any:
    """A copy in which each alias has its own value: an override changes one of them."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value
