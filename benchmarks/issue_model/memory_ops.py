"""Global and shared memory, its barriers, and the instructions that touch them.

Loads and stores name their event for the timing model: see `machine.Event`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .integer_ops import Builder, Run
from .listing import Instruction
from .operands import U32, U64, Array, Getter, bits, put_bits, put_wide, register, wide

SHARED_BYTES = 233472
WINDOW = 0xFFFFFF  # a shared address holds its block's rank in the cluster above these bits
JUMP_TABLE = re.compile(r"c\[0x2\]\[(U?R\d+)(?:\+(0x\w+))?\]")
ARRAY_SHIFT = 44  # array i of a call lies at (i + 1) << 44
ADDRESS = re.compile(r"\[(U?R(?:\d+|Z))(\.64)?((?:\+[^\]]+)?)\]")


class GlobalMemory:
    """The arrays of a call by their number, as bytes."""

    def __init__(self, arrays: dict[int, Array]) -> None:
        self.arrays = arrays

    def place(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """The array that all of `addresses` lie in, and the offsets; `size` bytes at each."""
        numbers = addresses >> U64(ARRAY_SHIFT)
        number = int(numbers[0])
        array = self.arrays.get(number - 1)
        offsets = (addresses & U64((1 << ARRAY_SHIFT) - 1)).astype(np.int64)
        if array is None or (numbers != number).any() or int(offsets.max()) + size > array.size:
            raise IndexError(f"global address {int(addresses[0]):#x} outside the call's arrays")
        return array, offsets


@dataclass
class Barrier:
    """An mbarrier: `phase` counts its completed phases."""

    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def arrive(self, count: int, expect_bytes: int) -> None:
        self.pending -= count
        self.bytes += expect_bytes
        self._turn()

    def land(self, size: int) -> None:
        self.bytes -= size
        self._turn()

    def _turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.expected


@dataclass
class SharedMemory:
    """A block's shared memory, as bytes, and the barriers in it by their offset.

    broadcasts: what other blocks sent to all, by their rank: (barrier, bytes)."""

    data: Array = field(default_factory=lambda: np.zeros(SHARED_BYTES, np.uint8))
    barriers: dict[int, Barrier] = field(default_factory=dict)
    broadcasts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


def shared_address(text: str) -> Getter:
    """[R25+URZ+0x10] and the like, as uint32."""
    match = ADDRESS.search(text)
    assert match, text
    getters = [bits(match[1])] + [bits(t) for t in match[3].split("+")[1:]]

    def get(w: Any) -> Array:
        total = getters[0](w)
        for g in getters[1:]:
            total = total + g(w)
        return total

    return get


def global_address(text: str) -> Getter:
    """desc[UR14][R4.64+0x2] and the like, as uint64."""
    match = ADDRESS.search(text.split("]", 1)[1] if text.startswith("desc") else text)
    assert match and match[2], text
    base = wide(match[1])
    terms = match[3].split("+")[1:]
    offset = sum(int(t, 16) for t in terms if "R" not in t)
    uniform = [wide(t.removesuffix(".64")) for t in terms if "R" in t]

    def get(w: Any) -> Array:
        total = base(w) + np.array([offset & (1 << 64) - 1], U64)
        for g in uniform:
            total = total + g(w)
        return total

    return get


def access_bytes(ins: Instruction) -> int:
    """How many bytes a load or store moves per lane."""
    for name, size in (("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2), ("64", 8), ("128", 16)):
        if name in ins.modifiers:
            return size
    return 4


def _targets(text: str, size: int) -> list[Any]:
    found = register(text)
    assert found is not None and not found[0], text
    if found[1] == 255:
        return [put_bits("RZ")] * max(1, size // 4)
    return [put_bits(f"R{found[1] + j}") for j in range(max(1, size // 4))]


def _sources(text: str, size: int) -> list[Getter]:
    found = register(text)
    assert found is not None, text
    if found[1] == 255:
        return [bits("RZ")] * max(1, size // 4)
    return [bits(f"R{found[1] + j}") for j in range(max(1, size // 4))]


def _load(ins: Instruction, data: Array, at: Array, size: int) -> list[Array]:
    if int((at & (size - 1)).max()) != 0:
        raise ValueError(f"misaligned: {ins.text}")
    if size == 1:
        return [data[at].astype(U32)]
    if size == 2:
        half = data.view(np.uint16)[at >> 1]
        return [half.view(np.int16).astype(np.int32).view(U32) if "S16" in ins.modifiers
                else half.astype(U32)]  # fmt: skip
    words = data.view(U32)
    return [words[(at >> 2) + j] for j in range(size // 4)]


def _store(ins: Instruction, data: Array, at: Array, size: int, values: list[Array]) -> None:
    if int((at & (size - 1)).max()) != 0:
        raise ValueError(f"misaligned: {ins.text}")
    if size == 1:
        data[at] = values[0].astype(np.uint8)
    elif size == 2:
        data.view(np.uint16)[at >> 1] = values[0].astype(np.uint16)
    else:
        words = data.view(U32)
        for j, value in enumerate(values):
            words[(at >> 2) + j] = value


def _lanes(x: Array, m: Any) -> Array:
    """The active lanes' values; those of a uniform register are the same in all."""
    if x.shape[0] == 1:
        x = np.broadcast_to(x, (32,))
    return x if m is None else x[m]


def _spread(value: Array, m: Any) -> Array:
    if m is None:
        return value
    whole = np.zeros(32, U32)
    whole[m] = value
    return whole


def _shared_offsets(w: Any, address: Getter, m: Any) -> Array:
    at = _lanes(address(w), m)
    if (at >> U32(24) != w.block.rank).any():
        raise IndexError("a load or store in another block's shared memory")
    return (at & U32(WINDOW)).astype(np.int64)


def load_shared(ins: Instruction) -> Run:
    size, address = access_bytes(ins), shared_address(ins.operands[1])
    targets = _targets(ins.operands[0], size)

    def run(w: Any, m: Any) -> None:
        at = _shared_offsets(w, address, m)
        for put, value in zip(targets, _load(ins, w.block.shared.data, at, size), strict=True):
            put(w, _spread(value, m), m)

    return run


def store_shared(ins: Instruction) -> Run:
    size, address = access_bytes(ins), shared_address(ins.operands[0])
    sources = _sources(ins.operands[1], size)

    def run(w: Any, m: Any) -> None:
        at = _shared_offsets(w, address, m)
        _store(ins, w.block.shared.data, at, size, [_lanes(s(w), m) for s in sources])

    return run


def load_global(ins: Instruction) -> Run:
    size, address = access_bytes(ins), global_address(ins.operands[1])
    targets = _targets(ins.operands[0], size)

    def run(w: Any, m: Any) -> None:
        lanes = _lanes(address(w), m)
        data, at = w.block.cluster.memory.place(lanes, size)
        w.event = ("load", len(lanes) * size)
        for put, value in zip(targets, _load(ins, data, at, size), strict=True):
            put(w, _spread(value, m), m)

    return run


def store_global(ins: Instruction) -> Run:
    size, address = access_bytes(ins), global_address(ins.operands[0])
    sources = _sources(ins.operands[1], size)

    def run(w: Any, m: Any) -> None:
        lanes = _lanes(address(w), m)
        data, at = w.block.cluster.memory.place(lanes, size)
        w.event = ("store", len(lanes) * size)
        _store(ins, data, at, size, [_lanes(s(w), m) for s in sources])

    return run


def load_constant(ins: Instruction) -> Run:
    size = access_bytes(ins)
    if size == 8:
        put_two, get_two = put_wide(ins.operands[0]), wide(ins.operands[1])
        return lambda w, m: put_two(w, get_two(w), m)
    put = put_bits(ins.operands[0])
    if match := JUMP_TABLE.match(ins.operands[1]):
        index, first = bits(match[1]), int(match[2] or "0", 16) // 4

        def look_up(w: Any, m: Any) -> None:
            put(w, w.block.cluster.jump_table.take(first + index(w) // 4, mode="clip"), m)

        return look_up
    if size == 4:
        get = bits(ins.operands[1])
        return lambda w, m: put(w, get(w), m)
    offset = int(ins.operands[1].split("[")[2].rstrip("]"), 16)
    return lambda w, m: put(w, w.constants.view(np.uint8)[offset : offset + 1].astype(U32), m)


# ---- barriers, bulk copies and messages -------------------------------------------------------


def barrier_exchange(ins: Instruction) -> Run:
    """mbarrier.init: the count is held as 2^20 - count, from bit 1 on."""
    address, value = shared_address(ins.operands[1]), bits(ins.operands[2])

    def run(w: Any, m: Any) -> None:
        count = (1 << 20) - (int(value(w)[0]) >> 1 & (1 << 20) - 1)
        w.block.shared.barriers[int(address(w)[0]) & WINDOW] = Barrier(count, count)

    return run


def barrier_arrive(ins: Instruction) -> Run:
    """mbarrier.arrive, with the bytes to expect in a register unless A1T0."""
    address, value = shared_address(ins.operands[1]), bits(ins.operands[2])
    if ins.modifiers - {"ARRIVE", "TRANS64", "A1T0"}:
        raise NotImplementedError(ins.text)
    plain = "A1T0" in ins.modifiers

    def run(w: Any, m: Any) -> None:
        at = _lanes(address(w), m)
        expected = _lanes(value(w), m)
        offset, count = int(at[0]) & WINDOW, len(at)
        size = 0 if plain else int(expected.astype(np.int64).sum())
        w.event = ("arrive", offset, count, size)
        w.block.shared.barriers[offset].arrive(count, size)

    return run


def bulk_copy(ins: Instruction) -> Run:
    """cp.async.bulk from global to shared: [target, barrier], [source], words of 16 bytes."""
    target, source = register(ins.operands[0].strip("[]")), wide(ins.operands[1].strip("[]"))
    size = bits(ins.operands[2])
    assert target is not None
    first, second = bits(f"UR{target[1]}"), bits(f"UR{target[1] + 1}")

    def run(w: Any, m: Any) -> None:
        count = int(size(w)[0]) * 16
        shared = w.block.shared
        data, at = w.block.cluster.memory.place(source(w), count)
        into, barrier = int(first(w)[0]) & WINDOW, int(second(w)[0]) & WINDOW
        start = int(at[0])
        shared.data[into : into + count] = data[start : start + count]
        w.event = ("copy", barrier, count)
        shared.barriers[barrier].land(count)

    return run


def send(ins: Instruction) -> Run:
    """st.async of 16 bytes to [target, barrier] of any block of the cluster: of all lanes to one
    block, a message, or of each lane to another, a broadcast."""
    found = register(ins.operands[0].strip("[]"))
    assert found is not None and "128" in ins.modifiers
    low, high = bits(f"R{found[1]}"), bits(f"R{found[1] + 1}")
    sources = _sources(ins.operands[1], 16)

    def run(w: Any, m: Any) -> None:
        targets, barriers = _lanes(low(w), m), _lanes(high(w), m)
        values = [_lanes(s(w), m) for s in sources]
        ranks, offset = {to >> 24 for to in targets.tolist()}, 0
        for lane, (to, barrier) in enumerate(zip(targets.tolist(), barriers.tolist(), strict=True)):
            peer = w.block.cluster.blocks[to >> 24].shared
            if barrier & WINDOW not in peer.barriers:
                to, barrier = barrier, to
            at = to & WINDOW
            peer.data[at : at + 16].view(U32)[:] = [v[lane] for v in values]
            offset = barrier & WINDOW
            peer.barriers[offset].land(16)
            if len(ranks) > 1 and peer is not w.block.shared:
                peer.broadcasts.setdefault(w.block.rank, []).append((offset, 16))
        if len(ranks) > 1:
            w.event = ("broadcast", offset, 16)
        else:
            w.event = ("message", offset, 16 * len(targets), ranks.pop())

    return run


BUILDERS: dict[str, Builder] = {
    "LDS": load_shared, "STS": store_shared, "LDG": load_global, "STG": store_global,
    "LDC": load_constant, "UBLKCP": bulk_copy, "STAS": send, "EXCH": barrier_exchange,
    "ARRIVE": barrier_arrive,
}  # fmt: skip
