"""What floating-point instructions of sm_90 do. A float32 fma is rounded from float64, a float64
one from the host's extended precision; roundings other than to nearest are honored where integer
divisions depend on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .integer_ops import ORDER, Builder, Run, combine
from .listing import Instruction
from .operands import (
    F32,
    F64,
    U32,
    U64,
    Array,
    Getter,
    bits,
    double,
    predicate_getter,
    put_bits,
    put_predicate,
    put_wide,
    single,
    wide,
)

Wide = np.longdouble


def _put_single(text: str) -> Callable[[Any, Array, Any], None]:
    put = put_bits(text)
    return lambda w, value, m: put(w, value.view(U32), m)


def _put_double(text: str) -> Callable[[Any, Array, Any], None]:
    put = put_wide(text)
    return lambda w, value, m: put(w, np.ascontiguousarray(value), m)


def _saturated(ins: Instruction, compute: Callable[[Any], Array]) -> Callable[[Any], Array]:
    if "SAT" not in ins.modifiers:
        return compute
    return lambda w: np.clip(compute(w), F32(0), F32(1))


def fadd(ins: Instruction) -> Run:
    out, (a, b) = _put_single(ins.operands[0]), (single(t) for t in ins.operands[1:3])
    compute = _saturated(ins, lambda w: a(w) + b(w))
    return lambda w, m: out(w, compute(w), m)


def fmul(ins: Instruction) -> Run:
    out, (a, b) = _put_single(ins.operands[0]), (single(t) for t in ins.operands[1:3])
    compute = _saturated(ins, lambda w: a(w) * b(w))
    return lambda w, m: out(w, compute(w), m)


def ffma(ins: Instruction) -> Run:
    out, (a, b, c) = _put_single(ins.operands[0]), (single(t) for t in ins.operands[1:4])
    compute = _saturated(
        ins, lambda w: (a(w).astype(F64) * b(w).astype(F64) + c(w).astype(F64)).astype(F32)
    )
    return lambda w, m: out(w, compute(w), m)


def dadd(ins: Instruction) -> Run:
    out, (a, b) = _put_double(ins.operands[0]), (double(t) for t in ins.operands[1:3])
    return lambda w, m: out(w, a(w) + b(w), m)


def dmul(ins: Instruction) -> Run:
    out, (a, b) = _put_double(ins.operands[0]), (double(t) for t in ins.operands[1:3])
    return lambda w, m: out(w, a(w) * b(w), m)


def dfma(ins: Instruction) -> Run:
    out, (a, b, c) = _put_double(ins.operands[0]), (double(t) for t in ins.operands[1:4])
    return lambda w, m: out(
        w, (a(w).astype(Wide) * b(w).astype(Wide) + c(w).astype(Wide)).astype(F64), m
    )


def _compare(name: str, x: Array, y: Array) -> Array:
    unordered = np.isnan(x) | np.isnan(y)
    if name == "NAN":
        return unordered
    if name == "NUM":
        return ~unordered
    if name.endswith("U") and name[:-1] in ORDER:
        return ORDER[name[:-1]](x, y) | unordered
    return ORDER[name](x, y) & ~unordered


def _setp(get: Callable[[str], Getter]) -> Builder:
    def build(ins: Instruction) -> Run:
        first, second = put_predicate(ins.operands[0]), put_predicate(ins.operands[1])
        a, b = get(ins.operands[2]), get(ins.operands[3])
        with_p = predicate_getter(ins.operands[4])
        name = ins.opcode.split(".")[1]

        def run(w: Any, m: Any) -> None:
            result = _compare(name, a(w), b(w))
            p = with_p(w)
            first(w, combine(ins.modifiers, result, p), m)
            second(w, combine(ins.modifiers, ~result, p), m)

        return run

    return build


def fsel(ins: Instruction) -> Run:
    out, (a, b) = _put_single(ins.operands[0]), (single(t) for t in ins.operands[1:3])
    p = predicate_getter(ins.operands[3])
    return lambda w, m: out(w, np.where(p(w), a(w), b(w)), m)


def fmnmx(ins: Instruction) -> Run:
    out, (a, b) = _put_single(ins.operands[0]), (single(t) for t in ins.operands[1:3])
    p = predicate_getter(ins.operands[3])
    low, high = (np.minimum, np.maximum) if "NAN" in ins.modifiers else (np.fmin, np.fmax)
    return lambda w, m: out(w, np.where(p(w), low(a(w), b(w)), high(a(w), b(w))), m)


def _halves(brain: bool, x: Array) -> list[Array]:
    """The two numbers of a packed register, low first, as float32."""
    if brain:
        return [(x << U32(16)).view(F32), (x & U32(0xFFFF0000)).view(F32)]
    return [(x >> U32(s) & U32(0xFFFF)).astype(np.uint16).view(np.float16).astype(F32)
            for s in (0, 16)]  # fmt: skip


def _packed(brain: bool, low: Array, high: Array) -> Array:
    if brain:
        return _bf16(low) | (_bf16(high) << U32(16))
    two = [x.astype(np.float16).view(np.uint16).astype(U32) for x in (low, high)]
    return two[0] | (two[1] << U32(16))


def _bf16(x: Array) -> Array:
    """float32 rounded to bfloat16, in the low half."""
    raw = x.view(U32)
    rounded = (raw + U32(0x7FFF) + (raw >> U32(16) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded)


def hmnmx2(ins: Instruction) -> Run:
    """Packed minima or maxima of two or three operands."""
    out = put_bits(ins.operands[0])
    terms = [bits(t) for t in ins.operands[1:-1]]
    p = predicate_getter(ins.operands[-1])
    brain = "BF16_V2" in ins.modifiers
    low, high = (np.minimum, np.maximum) if "NAN" in ins.modifiers else (np.fmin, np.fmax)

    def run(w: Any, m: Any) -> None:
        parts = [_halves(brain, t(w)) for t in terms]
        best = parts[0]
        for part in parts[1:]:
            best = [np.where(p(w), low(x, y), high(x, y)) for x, y in zip(best, part, strict=True)]
        out(w, _packed(brain, *best), m)

    return run


def hfma2(ins: Instruction) -> Run:
    """Only as the compiler's way to write a constant."""
    assert ins.operands[1:3] == ["-RZ", "RZ"], ins.text
    halves = [np.float16(float(t)).view(np.uint16) for t in ins.operands[3:5]]
    value = np.array([int(halves[0]) << 16 | int(halves[1])], U32)
    out = put_bits(ins.operands[0])
    return lambda w, m: out(w, value, m)


def hadd2(ins: Instruction) -> Run:
    """Only as the conversion of one half of a register to float32."""
    assert "F32" in ins.modifiers and ins.operands[1] == "-RZ", ins.text
    name, _, half = ins.operands[2].partition(".")
    get, out, i = bits(name), _put_single(ins.operands[0]), int(half == "H1_H1")
    return lambda w, m: out(w, _halves(False, get(w))[i], m)


def f2fp(ins: Instruction) -> Run:
    out, (a, b) = put_bits(ins.operands[0]), (single(t) for t in ins.operands[1:3])
    brain = "BF16" in ins.modifiers
    return lambda w, m: out(w, _packed(brain, b(w) + F32(0), a(w) + F32(0)), m)


def _special(name: str) -> Callable[[Array], Array]:
    one = F32(1)
    table: dict[str, Callable[[Array], Array]] = {
        "EX2": lambda x: np.exp2(x),
        "LG2": lambda x: np.log2(x),
        "RCP": lambda x: one / x,
        "RSQ": lambda x: one / np.sqrt(x),
        "SQRT": lambda x: np.sqrt(x),
        "TANH": lambda x: np.tanh(x),
        "SIN": lambda x: np.sin(x),
        "COS": lambda x: np.cos(x),
    }
    return table[name]


def mufu(ins: Instruction) -> Run:
    name = ins.opcode.split(".")[1]
    if name in ("RCP64H", "RSQ64H"):
        out, high = put_bits(ins.operands[0]), bits(ins.operands[1])

        def run(w: Any, m: Any) -> None:
            x = (high(w).astype(U64) << U64(32)).view(F64)
            y = 1.0 / (x if name == "RCP64H" else np.sqrt(x))
            out(w, (y.view(U64) >> U64(32)).astype(U32), m)

        return run
    put, get, compute = _put_single(ins.operands[0]), single(ins.operands[1]), _special(name)
    return lambda w, m: put(w, compute(get(w)), m)


def f2f(ins: Instruction) -> Run:
    narrow = ins.opcode.startswith("F2F.F32.F64")
    if narrow:
        put, get = _put_single(ins.operands[0]), double(ins.operands[1])
        return lambda w, m: put(w, get(w).astype(F32), m)
    assert ins.opcode.startswith("F2F.F64.F32"), ins.text
    put, get = _put_double(ins.operands[0]), single(ins.operands[1])
    return lambda w, m: put(w, get(w).astype(F64), m)


INTEGER: dict[str, tuple[Any, Callable[[str], Getter]]] = {
    "U32": (U32, bits), "S32": (np.int32, bits), "U64": (U64, wide), "S64": (np.int64, wide)
}  # fmt: skip


def _integer_type(ins: Instruction) -> str:
    return next((n for n in INTEGER if n in ins.modifiers), "S32")


def i2f(ins: Instruction) -> Run:
    kind, get_of = INTEGER[_integer_type(ins)]
    get = get_of(ins.operands[1])
    if "F64" in ins.modifiers:
        put = _put_double(ins.operands[0])
        return lambda w, m: put(w, get(w).view(kind).astype(F64), m)
    out = _put_single(ins.operands[0])
    up = "RP" in ins.modifiers

    def run(w: Any, m: Any) -> None:
        whole = get(w).view(kind)
        x = whole.astype(F32)
        if up:
            x = np.where(x.astype(Wide) < whole.astype(Wide), np.nextafter(x, F32(np.inf)), x)
        out(w, x, m)

    return run


def f2i(ins: Instruction) -> Run:
    name = _integer_type(ins)
    kind = INTEGER[name][0]
    get = double(ins.operands[1]) if "F64" in ins.modifiers else single(ins.operands[1])
    put = put_wide(ins.operands[0]) if name.endswith("64") else put_bits(ins.operands[0])
    to_whole = np.trunc if "TRUNC" in ins.modifiers else np.rint
    limits = np.iinfo(kind)

    def run(w: Any, m: Any) -> None:
        x = np.nan_to_num(to_whole(get(w)).astype(Wide), nan=0.0)
        x = np.clip(x, Wide(limits.min), Wide(limits.max))
        put(w, x.astype(kind).view(U64 if name.endswith("64") else U32), m)

    return run


def frnd(ins: Instruction) -> Run:
    modes = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}
    rounding = next((modes[n] for n in modes if n in ins.modifiers), np.rint)
    wide_type = "F64" in ins.modifiers
    put = _put_double(ins.operands[0]) if wide_type else _put_single(ins.operands[0])
    get = double(ins.operands[1]) if wide_type else single(ins.operands[1])
    return lambda w, m: put(w, rounding(get(w)), m)


def fchk(ins: Instruction) -> Run:
    """Whether a division needs its slow path: extreme exponents."""
    out, (a, b) = put_predicate(ins.operands[0]), (single(t) for t in ins.operands[1:3])

    def run(w: Any, m: Any) -> None:
        ea, eb = (x.view(U32) >> U32(23) & U32(0xFF) for x in (a(w), b(w)))
        far = (ea.astype(int) - eb.astype(int) > 100) | (eb.astype(int) - ea.astype(int) > 100)
        out(w, far | (ea == 255) | (eb == 255) | (eb == 0) | (eb > 252), m)

    return run


BUILDERS: dict[str, Builder] = {
    "FADD": fadd, "FMUL": fmul, "FFMA": ffma, "DADD": dadd, "DMUL": dmul, "DFMA": dfma,
    "FSETP": _setp(single), "DSETP": _setp(double), "FSEL": fsel, "FMNMX": fmnmx, "HMNMX2": hmnmx2,
    "VHMNMX": hmnmx2, "HFMA2": hfma2, "HADD2": hadd2, "F2FP": f2fp, "MUFU": mufu, "F2F": f2f,
    "I2F": i2f, "I2FP": i2f, "F2I": f2i, "FRND": frnd, "FCHK": fchk,
}  # fmt: skip
