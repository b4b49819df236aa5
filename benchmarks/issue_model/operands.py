"""Operands of instructions as functions of a warp's registers.

Registers of a warp are uint32 [256, 32], uniform ones uint32 [64, 1], so that the same arithmetic
serves both; predicates likewise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

U32, U64, F32, F64 = np.uint32, np.uint64, np.float32, np.float64
Array = np.ndarray[Any, Any]
Getter = Callable[[Any], Array]

REGISTER = re.compile(r"^(U?)R(Z|\d+)(?:\.(\w+))?$")
PREDICATE = re.compile(r"^(U?)P(T|\d+)$")
CONSTANT = re.compile(r"^c\[0x0\]\[(0x[0-9a-f]+|RZ)\]$")
SPECIAL = {"+INF": np.inf, "-INF": -np.inf, "+QNAN": np.nan, "-QNAN": np.nan, "INF": np.inf}
ZERO = 255
UNIFORM_ZERO = 63


def register(text: str) -> tuple[bool, int] | None:
    """(uniform, index) of a plain register, else None."""
    match = REGISTER.match(text)
    if match is None:
        return None
    uniform = match[1] == "U"
    index = (UNIFORM_ZERO if uniform else ZERO) if match[2] == "Z" else int(match[2])
    return uniform, index


def predicate(text: str) -> tuple[bool, bool, int] | None:
    """(negated, uniform, index) of a predicate, else None."""
    match = PREDICATE.match(text.removeprefix("!"))
    if match is None:
        return None
    return text.startswith("!"), match[1] == "U", 7 if match[2] == "T" else int(match[2])


def predicate_getter(text: str) -> Getter:
    """Of a predicate operand: bool [32] or [1]."""
    found = predicate(text)
    assert found is not None, text
    negated, uniform, i = found
    if uniform:
        return (lambda w: ~w.up[i]) if negated else (lambda w: w.up[i])
    return (lambda w: ~w.p[i]) if negated else (lambda w: w.p[i])


def _immediate(text: str) -> int | float | None:
    if re.match(r"^-?0x[0-9a-f]+$", text):
        return int(text, 16)
    if text in SPECIAL:
        return SPECIAL[text]
    try:
        return float(text)
    except ValueError:
        return None


def _signs(text: str) -> tuple[str, bool, bool, bool]:
    """The operand without its sign, and whether it is negated, inverted, taken absolute."""
    negated = text.startswith("-") and _immediate(text) is None
    text = text[1:] if negated else text
    inverted = text.startswith("~")
    text = text.removeprefix("~")
    absolute = text.startswith("|")
    text = text.strip("|")
    if absolute and "|" in text:
        text = text.replace("|", "")
    return text, negated, inverted, absolute


def bits(text: str) -> Getter:
    """A 32-bit operand, as uint32; a decimal immediate is a float32."""
    name, negated, inverted, absolute = _signs(text)
    assert not absolute, text
    value = _immediate(name)
    if value is not None:
        raw = F32(value).view(U32) if isinstance(value, float) else U32(value & 0xFFFFFFFF)
        constant = np.array([raw], U32)
        if inverted:
            constant = ~constant
        return lambda w: constant
    get = _raw(name)
    if negated:
        return lambda w: U32(0) - get(w)
    return (lambda w: ~get(w)) if inverted else get


def _raw(name: str) -> Getter:
    if match := CONSTANT.match(name):
        offset = 0 if match[1] == "RZ" else int(match[1], 16) // 4
        return lambda w: w.constants[offset : offset + 1]
    found = register(name)
    assert found is not None, name
    uniform, i = found
    return (lambda w: w.u[i]) if uniform else (lambda w: w.r[i])


def wide(text: str) -> Getter:
    """A 64-bit operand, as uint64: a pair of registers, two words of constants or an immediate."""
    name, negated, inverted, _ = _signs(text)
    value = _immediate(name)
    if value is not None:
        assert isinstance(value, int), text
        constant = np.array([value & 0xFFFFFFFFFFFFFFFF], U64)
        return lambda w: constant
    low, high = _pair(name)

    def get(w: Any) -> Array:
        x = low(w).astype(U64) | (high(w).astype(U64) << U64(32))
        if negated:
            return U64(0) - x
        return ~x if inverted else x

    return get


def _pair(name: str) -> tuple[Getter, Getter]:
    if match := CONSTANT.match(name):
        offset = int(match[1], 16)
        return _raw(f"c[0x0][{offset:#x}]"), _raw(f"c[0x0][{offset + 4:#x}]")
    found = register(name)
    assert found is not None, name
    uniform, i = found
    if i == (UNIFORM_ZERO if uniform else ZERO):
        return _raw(name), _raw(name)
    prefix = "UR" if uniform else "R"
    return _raw(f"{prefix}{i}"), _raw(f"{prefix}{i + 1}")


def single(text: str) -> Getter:
    """A float32 operand."""
    name, negated, _, absolute = _signs(text)
    value = _immediate(name)
    if value is not None:
        number = F32(value) if isinstance(value, float) else U32(value & 0xFFFFFFFF).view(F32)
        constant = np.array([-number if negated else number], F32)
        return lambda w: constant
    raw = _raw(name)

    def get(w: Any) -> Array:
        x = raw(w).view(F32)
        if absolute:
            x = np.abs(x)
        return -x if negated else x

    return get


def double(text: str) -> Getter:
    """A float64 operand."""
    name, negated, _, absolute = _signs(text)
    value = _immediate(name)
    if value is not None:
        number = -float(value) if negated else float(value)
        constant = np.array([number], F64)
        return lambda w: constant
    pair = wide(name)

    def get(w: Any) -> Array:
        x = pair(w).view(F64)
        if absolute:
            x = np.abs(x)
        return -x if negated else x

    return get


# ---- results ------------------------------------------------------------------------------------

Setter = Callable[[Any, Any, Any], None]  # (warp, value, mask); a mask of None is all lanes


def put_bits(text: str) -> Setter:
    """Stores a 32-bit result, uint32 [32] or [1]."""
    found = register(text)
    assert found is not None, text
    uniform, i = found
    if i == (UNIFORM_ZERO if uniform else ZERO):
        return lambda w, value, m: None
    if uniform:

        def put_uniform(w: Any, value: Any, m: Any) -> None:
            w.u[i] = value

        return put_uniform

    def put(w: Any, value: Any, m: Any) -> None:
        if m is None:
            w.r[i] = value
        else:
            np.copyto(w.r[i], value, where=m)

    return put


def put_wide(text: str) -> Setter:
    """Stores a 64-bit result in a pair of registers."""
    found = register(text)
    assert found is not None, text
    uniform, i = found
    if i == (UNIFORM_ZERO if uniform else ZERO):
        return lambda w, value, m: None
    prefix = "UR" if uniform else "R"
    low, high = put_bits(f"{prefix}{i}"), put_bits(f"{prefix}{i + 1}")

    def put(w: Any, value: Any, m: Any) -> None:
        value = value.view(U64)
        low(w, (value & U64(0xFFFFFFFF)).astype(U32), m)
        high(w, (value >> U64(32)).astype(U32), m)

    return put


def put_predicate(text: str) -> Setter:
    """Stores a predicate."""
    found = predicate(text)
    assert found is not None, text
    _, uniform, i = found
    if i == 7:
        return lambda w, value, m: None
    if uniform:

        def put_uniform(w: Any, value: Any, m: Any) -> None:
            w.up[i] = value

        return put_uniform

    def put(w: Any, value: Any, m: Any) -> None:
        if m is None:
            w.p[i] = value
        else:
            np.copyto(w.p[i], value, where=m)

    return put
