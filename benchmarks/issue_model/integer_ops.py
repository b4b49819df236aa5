"""What integer, logic and predicate instructions of sm_90 do: builders of (warp, mask) functions.

Uniform instructions (UIADD3, ULOP3, ...) are the same functions on registers of one lane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .listing import Instruction
from .operands import (
    U32,
    U64,
    Array,
    Getter,
    bits,
    predicate,
    predicate_getter,
    put_bits,
    put_predicate,
    put_wide,
    wide,
)

I32, I64 = np.int32, np.int64
Run = Callable[[Any, Any], None]  # (warp, mask); a mask of None is all lanes
Builder = Callable[[Instruction], Run]
LOW = U64(0xFFFFFFFF)
HALF = U64(32)


def split_predicates(operands: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Operands behind the result as: predicates in front, the rest, predicates behind."""
    i, j = 0, len(operands)
    while i < j and predicate(operands[i]):
        i += 1
    while j > i and predicate(operands[j - 1]):
        j -= 1
    return operands[:i], operands[i:j], operands[j:]


def _negatable(text: str) -> Getter:
    """For sums with a carry: -x counts as ~x + 1 in 33 bits."""
    if text.startswith("-") and not text.startswith("-0x"):
        plain = bits(text[1:])
        return lambda w: U64(1 << 32) - plain(w).astype(U64)
    get = bits(text)
    return lambda w: get(w).astype(U64)


def iadd3(ins: Instruction) -> Run:
    out = put_bits(ins.operands[0])
    carries, terms, inputs = split_predicates(ins.operands[1:])
    if not carries and "X" not in ins.modifiers:
        a, b, c = (bits(t) for t in terms)
        return lambda w, m: out(w, a(w) + b(w) + c(w), m)
    x, y, z = (_negatable(t) for t in terms)
    ins_p = [predicate_getter(p) for p in inputs] if "X" in ins.modifiers else []
    outs = [put_predicate(p) for p in carries]

    def run(w: Any, m: Any) -> None:
        total = x(w) + y(w) + z(w)
        for p in ins_p:
            total = total + p(w).astype(U64)
        carry = total >> HALF
        for i, put in enumerate(outs):
            put(w, carry > U64(i), m)
        out(w, (total & LOW).astype(U32), m)

    return run


def viadd(ins: Instruction) -> Run:
    out, a, b = put_bits(ins.operands[0]), bits(ins.operands[1]), bits(ins.operands[2])
    return lambda w, m: out(w, a(w) + b(w), m)


def imad(ins: Instruction) -> Run:
    modifiers = ins.modifiers
    carries, (ta, tb, tc), inputs = split_predicates(ins.operands[1:])
    a, b = bits(ta), bits(tb)
    if "WIDE" in modifiers or "HI" in modifiers:
        return _imad_wide(ins, a, b, wide(tc), carries, inputs)
    out, c = put_bits(ins.operands[0]), bits(tc)
    assert not carries, ins.text
    if "X" in modifiers:
        p = predicate_getter(inputs[0])
        return lambda w, m: out(w, a(w) * b(w) + c(w) + p(w).astype(U32), m)
    return lambda w, m: out(w, a(w) * b(w) + c(w), m)


def _imad_wide(
    ins: Instruction, a: Getter, b: Getter, c: Getter, carries: list[str], inputs: list[str]
) -> Run:
    kind = U64 if "U32" in ins.modifiers else I64
    mid = U32 if kind is U64 else I32
    outs = [put_predicate(p) for p in carries]
    ins_p = [predicate_getter(p) for p in inputs] if "X" in ins.modifiers else []
    high = "HI" in ins.modifiers
    put_one, put_two = put_bits(ins.operands[0]), put_wide(ins.operands[0])

    def run(w: Any, m: Any) -> None:
        product = (a(w).view(mid).astype(kind) * b(w).view(mid).astype(kind)).view(U64)
        total = product + c(w)
        carry = total < product
        for p in ins_p:
            total = total + p(w).astype(U64)
        for put in outs:
            put(w, carry, m)
        if high:
            put_one(w, (total >> HALF).astype(U32), m)
        else:
            put_two(w, np.ascontiguousarray(total), m)

    return run


def lea(ins: Instruction) -> Run:
    out = put_bits(ins.operands[0])
    carries, terms, inputs = split_predicates(ins.operands[1:])
    outs = [put_predicate(p) for p in carries]
    p = predicate_getter(inputs[0]) if "X" in ins.modifiers else None
    high = "HI" in ins.modifiers
    shift = U64(int(terms[-1], 16))
    a = bits(terms[0])
    b = bits(terms[1])
    signed = "SX32" in ins.modifiers
    c = bits(terms[2]) if high and not signed else None

    def run(w: Any, m: Any) -> None:
        x = a(w)
        if signed:
            whole = x.view(I32).astype(I64).view(U64)
        else:
            whole = x.astype(U64) | (c(w).astype(U64) << HALF if c is not None else U64(0))
        moved = whole << shift
        part = (moved >> HALF) if high else (moved & LOW)
        total = part + b(w).astype(U64)
        if p is not None:
            total = total + p(w).astype(U64)
        for put in outs:
            put(w, total > LOW, m)
        out(w, (total & LOW).astype(U32), m)

    return run


def _by_table(table: int, a: Array, b: Array, c: Array) -> Array:
    """A three-input logic function by its table of 8 bits."""
    known = {0xC0: lambda: a & b, 0xFC: lambda: a | b, 0x3C: lambda: a ^ b, 0x33: lambda: ~b}
    if table in known:
        return known[table]()
    result = a & U32(0)
    for i in range(8):
        if table >> i & 1:
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result = result | term
    return result


def lop3(ins: Instruction) -> Run:
    operands = list(ins.operands)
    target = put_predicate(operands.pop(0)) if predicate(operands[0]) else None
    out = put_bits(operands[0])
    a, b, c = (bits(t) for t in operands[1:4])
    table = int(operands[4], 16)

    def run(w: Any, m: Any) -> None:
        value = _by_table(table, a(w), b(w), c(w))
        if target is not None:
            target(w, value != 0, m)
        out(w, value, m)

    return run


def plop3(ins: Instruction) -> Run:
    first, second = put_predicate(ins.operands[0]), put_predicate(ins.operands[1])
    a, b, c = (predicate_getter(t) for t in ins.operands[2:5])
    tables = [int(t, 16) for t in ins.operands[5:7]]

    def run(w: Any, m: Any) -> None:
        index = a(w) * 4 + b(w) * 2 + c(w) * 1
        for put, table in zip((first, second), tables, strict=True):
            put(w, (table >> index & 1).astype(bool), m)

    return run


def shf(ins: Instruction) -> Run:
    out = put_bits(ins.operands[0])
    low, shift, high = (bits(t) for t in ins.operands[1:4])
    modifiers = ins.modifiers
    signed = bool({"S32", "S64"} & modifiers)
    wrap = "W" in modifiers
    wide_type = bool({"U64", "S64"} & modifiers)
    take_high = "HI" in modifiers
    left = "L" in modifiers

    def run(w: Any, m: Any) -> None:
        x = low(w).astype(U64) | (high(w).astype(U64) << HALF)
        s = shift(w).astype(U64)
        s = s & U64(63 if wide_type else 31) if wrap else np.minimum(s, U64(63))
        if left:
            x = x << s
        elif signed:
            x = (x.view(I64) >> s.astype(I64)).view(U64)
        else:
            x = x >> s
        out(w, ((x >> HALF) if take_high else (x & LOW)).astype(U32), m)

    return run


ORDER: dict[str, Callable[[Array, Array], Array]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def combine(modifiers: frozenset[str], a: Array, b: Array) -> Array:
    """A comparison's result with a further predicate."""
    if "AND" in modifiers:
        return a & b
    return a | b if "OR" in modifiers else a ^ b


def isetp(ins: Instruction) -> Run:
    first, second = put_predicate(ins.operands[0]), put_predicate(ins.operands[1])
    a, b = bits(ins.operands[2]), bits(ins.operands[3])
    with_p = predicate_getter(ins.operands[4])
    name = ins.opcode.split(".")[1]
    compare = ORDER[name]
    strict = ORDER[name.replace("E", "T") if name in ("LE", "GE") else name]
    unsigned = "U32" in ins.modifiers
    low = predicate_getter(ins.operands[5]) if "EX" in ins.modifiers else None

    def run(w: Any, m: Any) -> None:
        x, y = a(w), b(w)
        if not unsigned:
            x, y = x.view(I32), y.view(I32)
        if low is None:
            result = compare(x, y)
        elif name == "EQ":
            result = (x == y) & low(w)
        elif name == "NE":
            result = (x != y) | low(w)
        else:
            result = strict(x, y) | ((x == y) & low(w))
        p = with_p(w)
        first(w, combine(ins.modifiers, result, p), m)
        second(w, combine(ins.modifiers, ~result, p), m)

    return run


def select(ins: Instruction) -> Run:
    out, a, b = put_bits(ins.operands[0]), bits(ins.operands[1]), bits(ins.operands[2])
    p = predicate_getter(ins.operands[3])
    return lambda w, m: out(w, np.where(p(w), a(w), b(w)), m)


def move(ins: Instruction) -> Run:
    out, a = put_bits(ins.operands[0]), bits(ins.operands[1])
    return lambda w, m: out(w, a(w), m)


def _smaller_or_larger(unsigned: bool, x: Array, y: Array, p: Array) -> Array:
    if not unsigned:
        x, y = x.view(I32), y.view(I32)
    return np.where(p, np.minimum(x, y), np.maximum(x, y)).view(U32)


def vimnmx(ins: Instruction) -> Run:
    out, (a, b) = put_bits(ins.operands[0]), (bits(t) for t in ins.operands[1:3])
    p, unsigned = predicate_getter(ins.operands[3]), "U32" in ins.modifiers
    return lambda w, m: out(w, _smaller_or_larger(unsigned, a(w), b(w), p(w)), m)


def vimnmx3(ins: Instruction) -> Run:
    out, (a, b, c) = put_bits(ins.operands[0]), (bits(t) for t in ins.operands[1:4])
    p, unsigned = predicate_getter(ins.operands[4]), "U32" in ins.modifiers
    return lambda w, m: out(
        w,
        _smaller_or_larger(unsigned, _smaller_or_larger(unsigned, a(w), b(w), p(w)), c(w), p(w)),
        m,
    )


def viaddmnmx(ins: Instruction) -> Run:
    out, (a, b, c) = put_bits(ins.operands[0]), (bits(t) for t in ins.operands[1:4])
    p, unsigned = predicate_getter(ins.operands[4]), "U32" in ins.modifiers
    return lambda w, m: out(w, _smaller_or_larger(unsigned, a(w) + b(w), c(w), p(w)), m)


def iabs(ins: Instruction) -> Run:
    out, a = put_bits(ins.operands[0]), bits(ins.operands[1])
    return lambda w, m: out(w, np.abs(a(w).view(I32)).view(U32), m)


def popc(ins: Instruction) -> Run:
    out, a = put_bits(ins.operands[0]), bits(ins.operands[1])
    return lambda w, m: out(w, np.bitwise_count(a(w)).astype(U32), m)


def flo(ins: Instruction) -> Run:
    """The place of the leading one, counted from the top for .SH; -1 where there is none."""
    operands = [o for o in ins.operands if not predicate(o)]
    out, a = put_bits(operands[0]), bits(operands[1])
    from_top = "SH" in ins.modifiers

    def run(w: Any, m: Any) -> None:
        place = np.array([int(v).bit_length() - 1 for v in a(w)], I32)
        if from_top:
            place = np.where(place >= 0, 31 - place, place)
        out(w, place.astype(I32).view(U32), m)

    return run


def brev(ins: Instruction) -> Run:
    out, a = put_bits(ins.operands[0]), bits(ins.operands[1])

    def run(w: Any, m: Any) -> None:
        out(w, np.array([int(f"{int(v):032b}"[::-1], 2) for v in a(w)], U32), m)

    return run


def prmt(ins: Instruction) -> Run:
    out = put_bits(ins.operands[0])
    a, selector, b = (bits(t) for t in ins.operands[1:4])

    def run(w: Any, m: Any) -> None:
        whole = a(w).astype(U64) | (b(w).astype(U64) << HALF)
        pick = selector(w).astype(U64)
        result = whole & U64(0)
        for i in range(4):
            nibble = pick >> U64(4 * i) & U64(15)
            byte = whole >> (U64(8) * (nibble & U64(7))) & U64(0xFF)
            sign = np.where(byte & U64(0x80) != 0, U64(0xFF), U64(0))
            result = result | (np.where(nibble & U64(8) != 0, sign, byte) << U64(8 * i))
        out(w, result.astype(U32), m)

    return run


def p2r(ins: Instruction) -> Run:
    out, old, keep = put_bits(ins.operands[0]), bits(ins.operands[2]), bits(ins.operands[3])

    def run(w: Any, m: Any) -> None:
        packed = sum(w.p[i].astype(U32) << U32(i) for i in range(7))
        out(w, (packed & keep(w)) | (old(w) & ~keep(w)), m)

    return run


def r2p(ins: Instruction) -> Run:
    value, keep = bits(ins.operands[1]), int(ins.operands[2], 16)
    puts = [(i, put_predicate(f"P{i}")) for i in range(7) if keep >> i & 1]

    def run(w: Any, m: Any) -> None:
        x = value(w)
        for i, put in puts:
            put(w, (x >> U32(i) & U32(1)).astype(bool), m)

    return run


BUILDERS: dict[str, Builder] = {
    "IADD3": iadd3, "VIADD": viadd, "IMAD": imad, "LEA": lea, "LOP3": lop3, "PLOP3": plop3,
    "SHF": shf, "ISETP": isetp, "SEL": select, "MOV": move, "VIMNMX": vimnmx, "VIMNMX3": vimnmx3,
    "VIADDMNMX": viaddmnmx, "IABS": iabs, "POPC": popc, "FLO": flo, "BREV": brev, "PRMT": prmt,
    "P2R": p2r, "R2P": r2p,
}  # fmt: skip
