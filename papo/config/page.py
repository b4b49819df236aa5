"""docs/config.md, made from the declarations of the options."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from papo.config.text import sections_of, unwrapped


def reference_page(model: type[BaseModel], presets: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown page with every option and the table of presets."""
    lines = [
        "# Options",
        "",
        "Made by `python -m papo.config > docs/config.md` from the declarations in `papo/config/`; "
        "do not edit.",
        "",
        "One YAML file holds a run's options; `--set section.key=value` overrides one of them "
        "(the value is read as YAML).",
        "Unknown keys and values out of bounds are refused. The resolved options are saved as "
        "`config.yaml` in the run's folder.",
        "",
        "The file holds what JSON can: text, numbers, true, false, null, lists, and mappings with "
        "text for keys.",
        "Tags are refused. Dates, `010` and `1:30` are text. It may have 1 MiB and 10,000 values "
        "nested 32 deep,",
        "each alias counted as often as it is used.",
        "Counts are at most 10^9. Numbers that float32 takes are 0 or from 1e-30 to 1e30 in size.",
        "",
    ]
    nested = dict(sections_of(model))
    lines += _table("Run", model, [n for n in model.model_fields if n not in nested])
    for name, section in nested.items():
        lines += _table(f"`{name}`", section, list(section.model_fields))
    lines += [
        "## Methods",
        "",
        "`method` sets these defaults; what you write yourself wins.",
        "",
    ]
    lines += [
        "| key | " + " | ".join(f"`{name}`" for name in presets) + " |",
        "|---|" + "---|" * len(presets),
    ]
    keys = dict.fromkeys(
        (group, key)
        for preset in presets.values()
        for group, values in preset.items()
        for key in values
    )
    for group, key in keys:
        default = nested[group].model_fields[key].default
        cells = [_literal(preset.get(group, {}).get(key, default)) for preset in presets.values()]
        lines.append(f"| `{group}.{key}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _table(title: str, model: type[BaseModel], names: list[str]) -> list[str]:
    lines = [
        f"## {title}",
        "",
        unwrapped(model.__doc__ or ""),
        "",
        "| key | type | default | |",
        "|---|---|---|---|",
    ]
    for name in names:
        field = model.model_fields[name]
        default = "required" if field.default is PydanticUndefined else _literal(field.default)
        lines.append(
            f"| `{name}` | {_type_text(field)} | {default} | {unwrapped(field.description or '')} |"
        )
    return [*lines, ""]


def _literal(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        value = list(value)
    return '`""`' if value == "" else f"`{value}`"


def _type_text(field: FieldInfo) -> str:
    return (_name(field.annotation) + _bounds(field.metadata)).replace("|", "\\|")


def _name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{a}`" for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(a) for a in args if a is not type(None))
    if origin is typing.Annotated:
        return _name(args[0]) + _bounds(list(args[1:]))
    if origin is tuple:
        kinds = list(dict.fromkeys(map(_name, args)))
        return f"{len(args)} x {kinds[0]}" if len(kinds) == 1 else "; ".join(kinds)
    if origin is list:
        return f"list of {_name(args[0])}"
    if origin is dict:
        return "mapping"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}[
        annotation.__name__
    ]


def _bounds(metadata: list[Any]) -> str:
    symbols = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
    found = []
    for item in metadata:
        for inner in [item, *getattr(item, "metadata", [])]:
            if type(inner) in symbols:
                sign, attribute = symbols[type(inner)]
                found.append(f"{sign} {getattr(inner, attribute)}")
    return (" " + ", ".join(found)) if found else ""
