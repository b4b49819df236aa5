"""Instructions across the lanes of a warp, and special registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .listing import Instruction
from .operands import U32, bits, predicate, predicate_getter, put_bits, put_predicate, put_wide
from .warps import Warp, lanes_of


def read_special(ins: Instruction) -> Any:
    if ins.base == "CS2R":
        put_two = put_wide(ins.operands[0])
        return lambda w, m: put_two(w, np.zeros(32, np.uint64), m)
    put, name = put_bits(ins.operands[0]), ins.operands[1]
    return lambda w, m: put(w, w.special(name), m)


def to_uniform(ins: Instruction) -> Any:
    """The first active lane's value. A predicate, if there is one, says which lanes have another:
    a loop around the instruction ends when none has."""
    *other, target = ins.operands[:-1]
    put, get = put_bits(target), bits(ins.operands[-1])
    put_other = put_predicate(other[0]) if other else None

    def run(w: Warp, m: Any) -> None:
        values = np.broadcast_to(get(w), (32,))
        first = values[0 if m is None else int(np.argmax(m))]
        put(w, first, None)
        if put_other is not None:
            put_other(w, values != first, m)

    return run


def shuffle(ins: Instruction) -> Any:
    valid, out = put_predicate(ins.operands[0]), put_bits(ins.operands[1])
    value, by = bits(ins.operands[2]), bits(ins.operands[3])
    mode = ins.opcode.split(".")[1]
    lane = np.arange(32)

    def run(w: Warp, m: Any) -> None:
        offset = by(w).astype(np.int64)
        source = {
            "IDX": lambda: offset & 31,
            "BFLY": lambda: lane ^ offset,
            "UP": lambda: lane - offset,
            "DOWN": lambda: lane + offset,
        }[mode]()
        source = np.broadcast_to(source, (32,))
        inside = (source >= 0) & (source < 32)
        valid(w, inside, m)
        out(w, value(w)[np.where(inside, source, lane)], m)

    return run


def vote(ins: Instruction) -> Any:
    get = predicate_getter(ins.operands[-1])
    need_all = "ALL" in ins.modifiers
    results = ins.operands[:-1]
    puts = [(put_predicate(o), True) if predicate(o) else (put_bits(o), False) for o in results]

    def run(w: Warp, m: Any) -> None:
        active = np.ones(32, bool) if m is None else m
        x = np.broadcast_to(get(w), (32,)) & active
        verdict = bool((x == active).all()) if need_all else bool(x.any())
        for put, is_predicate in puts:
            value = np.array([verdict]) if is_predicate else np.array([lanes_of(x)], U32)
            put(w, value, m)

    return run


def reduce(ins: Instruction) -> Any:
    put, get = put_bits(ins.operands[0]), bits(ins.operands[1])
    kind = np.int32 if "S32" in ins.modifiers else U32
    names: dict[str, Callable[..., Any]] = {
        "MAX": np.max,
        "MIN": np.min,
        "OR": np.bitwise_or.reduce,
        "SUM": np.sum,
    }
    fold = next((f for n, f in names.items() if n in ins.modifiers), np.sum)

    def run(w: Warp, m: Any) -> None:
        x = get(w).view(kind)
        put(w, np.array([fold(x if m is None else x[m])]).astype(kind).view(U32), None)

    return run


def elect(ins: Instruction) -> Any:
    put = put_predicate(ins.operands[0])

    def run(w: Warp, m: Any) -> None:
        active = np.ones(32, bool) if m is None else m
        put(w, np.arange(32) == int(np.argmax(active)), active)

    return run


BUILDERS: dict[str, Callable[[Instruction], Any]] = {
    "S2R": read_special, "S2UR": read_special, "CS2R": read_special, "R2UR": to_uniform,
    "SHFL": shuffle, "VOTE": vote, "VOTEU": vote, "REDUX": reduce, "ELECT": elect,
}  # fmt: skip
