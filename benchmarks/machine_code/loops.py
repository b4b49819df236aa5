"""Innermost loops of machine code, and what one round of each executes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

BYTES = 16  # of an instruction
BRANCH = re.compile(r"(@!?U?P\d )?BRA(\S*) (.*?)(0x[0-9a-f]+)")
LEAVES = re.compile(r"(EXIT|RET|BRX|KILL)")


class Round(NamedTuple):
    """A loop's usual round: how many instructions it has, and how many of them are of a kind."""

    length: int
    loads: int  # of 16 bytes, from shared memory
    exponentials: int
    maxima: int  # of pairs of half-width numbers
    float_maxima: int
    stores: int  # of 16 bytes, to global memory


class Branch(NamedTuple):
    """Where a branch goes, as an index; `always`: it is not under a condition."""

    target: int
    always: bool


def branch_of(instruction: str) -> Branch | None:
    """The branch that an instruction is, if it is one."""
    match = BRANCH.match(instruction)
    if match is None:
        return None
    guard, modifiers, condition, target = match.groups()
    always = not guard and not condition and ".DIV" not in modifiers
    return Branch(int(target, 16) // BYTES, always)


def rounds(code: Sequence[str]) -> Iterator[Round]:
    """The usual round of every innermost loop that reads 16 bytes at a time from shared memory."""
    branches = [branch_of(instruction) for instruction in code]
    loops = [(b.target, i) for i, b in enumerate(branches) if b is not None and b.target < i]
    for begin, end in loops:
        if any(begin <= b and e <= end for b, e in loops if (b, e) != (begin, end)):
            continue
        way = shortest_loading_way(code, branches, begin, end)
        if way is not None:
            yield counted([code[i] for i in way])


def shortest_loading_way(
    code: Sequence[str], branches: Sequence[Branch | None], begin: int, end: int
) -> list[int] | None:
    """The shortest way from `begin` to `end` with a load of 16 bytes from shared memory: a usual
    round. Words at a slice's end take longer ways, and the last round loads nothing."""
    ways: dict[tuple[int, bool], list[int]] = {(begin, False): []}
    for i in range(begin, end + 1):
        for loaded in (False, True):
            way = ways.pop((i, loaded), None)
            if way is None:
                continue
            way = [*way, i]
            has = loaded or "LDS.128" in code[i]
            if i == end:
                if has:
                    return way
                continue
            for j in following(code[i], branches[i], i):
                known = ways.get((j, has))
                if i < j <= end and (known is None or len(way) < len(known)):
                    ways[j, has] = way
    return None


def following(instruction: str, branch: Branch | None, i: int) -> list[int]:
    """Where control may go after instruction i."""
    if branch is not None:
        return [branch.target] if branch.always else [i + 1, branch.target]
    return [] if LEAVES.match(instruction) else [i + 1]


def counted(instructions: Sequence[str]) -> Round:
    def count(pattern: str) -> int:
        return sum(re.search(pattern, instruction) is not None for instruction in instructions)

    return Round(
        len(instructions),
        count(r"\bLDS\.128"),
        count(r"\bMUFU\.EX2"),
        count(r"\bV?HMNMX"),
        count(r"\bFMNMX"),
        count(r"\bSTG\.E\S*\.128"),
    )
