"""nvdisasm's text of one kernel as instructions with their control bits and source places."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
SECOND_HALF = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"^\s*(\.L_x_\d+|\$\S+):\s*$")
PLACE = re.compile(r'//## File "([^"]+)", line (\d+)')
BYTES = re.compile(r"\.byte\s+(.*)")
GUARD = re.compile(r"^@(!?)(U?P)(\w+)\s+")


@dataclass
class Instruction:
    """One instruction. `places`: (file, line), the innermost inlined function first.

    stall: cycles before the warp's next instruction; write_barrier, read_barrier: the scoreboards
    that it sets until its result is there and until its operands were read, 7 for none; wait: a
    mask of the scoreboards it waits for.
    """

    address: int
    opcode: str
    operands: list[str]
    guard: tuple[bool, str, int] | None
    places: tuple[tuple[str, int], ...]
    text: str
    stall: int = 1
    write_barrier: int = 7
    read_barrier: int = 7
    wait: int = 0

    def __post_init__(self) -> None:
        self.base, *modifiers = self.opcode.split(".")
        self.modifiers = frozenset(modifiers)


@dataclass
class Listing:
    """A kernel: its instructions, the index that a label or an address stands for, and the bytes of
    its jump table, which holds addresses."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    at_address: dict[int, int] = field(default_factory=dict)
    jump_table: bytes = b""


def _split(text: str) -> list[str]:
    parts = [p.strip().replace(".reuse", "") for p in text.split(",")]
    return [p for p in parts if p]


def _instruction(address: int, text: str, places: list[tuple[str, int]]) -> Instruction:
    guard = None
    rest = text
    if match := GUARD.match(text):
        guard = (match[1] == "!", match[2], 7 if match[3] == "T" else int(match[3]))
        rest = text[match.end() :]
    opcode, _, operands = rest.partition(" ")
    return Instruction(address, opcode, _split(operands), guard, tuple(places), text)


def parse(text: str) -> Listing:
    """`text`: as `build.disassembled` returns it."""
    listing = Listing()
    pending: list[str] = []
    places: list[tuple[str, int]] = []
    fresh = False
    for line in text.split("\n"):
        if match := PLACE.search(line):
            if not fresh:
                places, fresh = [], True
            places.append((Path(match[1]).name, int(match[2])))
        elif match := INSTRUCTION.search(line):
            fresh = False
            index = len(listing.instructions)
            instruction = _instruction(int(match[1], 16), match[2], places)
            listing.instructions.append(instruction)
            listing.at_address[instruction.address] = index
            listing.labels.update(dict.fromkeys(pending, index))
            pending = []
        elif match := SECOND_HALF.match(line):
            _control(listing.instructions[-1], int(match[1], 16))
        elif match := LABEL.match(line):
            pending.append(match[1])
        elif match := BYTES.search(line):
            listing.jump_table += bytes(int(byte, 16) for byte in match[1].split(","))
    return listing


def _control(instruction: Instruction, high: int) -> None:
    """The upper half of an encoding ends in the control bits of sm_70 and later."""
    instruction.stall = (high >> 41) & 15
    instruction.write_barrier = (high >> 46) & 7
    instruction.read_barrier = (high >> 49) & 7
    instruction.wait = (high >> 52) & 63
