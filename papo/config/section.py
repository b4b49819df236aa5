"""What the sections of options are made of: the kinds of values, their bounds, and one class."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
)
from pydantic_core import PydanticCustomError

from papo.inputs import is_plain

_MOST = 10**9
_LEAST_FLOAT, _MOST_FLOAT = 1e-30, 1e30  # float32 would make less 0 and more infinite
_LONGEST_PART = 240  # of a path, in bytes: file systems take 255, and names get endings


def _count(value: int) -> int:
    if value > _MOST:
        raise PydanticCustomError("count", f"at most {_MOST}")
    return value


def _float32(value: float) -> float:
    if value and math.isfinite(value) and not _LEAST_FLOAT <= abs(value) <= _MOST_FLOAT:
        sizes = f"a size from {_LEAST_FLOAT:g} to {_MOST_FLOAT:g}"
        raise PydanticCustomError("float32", f"{sizes}, which float32 holds")
    return value


Positive = Annotated[int, Field(gt=0), AfterValidator(_count)]
NonNegative = Annotated[int, Field(ge=0), AfterValidator(_count)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_float32)]
PositiveFloat = Annotated[FiniteFloat, Field(gt=0)]
NonNegativeFloat = Annotated[FiniteFloat, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
ClipLow = Annotated[float, Field(gt=0, le=1), AfterValidator(_float32)]
ClipHigh = Annotated[float, Field(gt=0), AfterValidator(_float32)]  # infinity sets no bound


def _path(value: str) -> str:
    _check_plain(value)
    try:
        too_long = any(len(os.fsencode(part)) > _LONGEST_PART for part in value.split("/"))
        Path(value).expanduser()
    except RuntimeError as error:
        raise PydanticCustomError("path", "a path in the home of a user that exists") from error
    if too_long or len(value) > 4 * _LONGEST_PART:
        raise PydanticCustomError("path", f"a path whose parts have at most {_LONGEST_PART} bytes")
    return value


PathText = Annotated[str, AfterValidator(_path)]


class Section(BaseModel):
    """What all sections share: they are frozen, refuse unknown keys, convert nothing silently, hold
    only what YAML, JSON and UTF-8 can give back, and take docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    @field_validator("*")
    @classmethod
    def _check_plain(cls, value: Any) -> Any:
        _check_plain(value)
        return value


def _check_plain(value: Any, in_mapping: bool = False) -> None:
    """Refuse text that no file can hold and, inside of mappings, numbers that JSON cannot."""
    if isinstance(value, str) and not is_plain(value):
        raise PydanticCustomError("text", "text without NUL and without half a surrogate pair")
    if in_mapping and isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("number", "finite numbers")
    if isinstance(value, Mapping):
        for part in (*value, *value.values()):
            _check_plain(part, True)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _check_plain(part, in_mapping)


def refuse(bad: bool, message: str) -> None:
    """Raise ValueError(message) if `bad`: for what the bounds of a single field cannot express."""
    if bad:
        raise ValueError(message)
