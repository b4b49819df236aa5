"""Runs one cluster of a compiled kernel: every warp of every block, lane by lane.

The result of a run is what each warp executed, in order, with what the timing model has to know of
it. Branches are taken as the data decide; a wait ends when its barrier's phase does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import float_ops, integer_ops, memory_ops
from .build import Launch
from .listing import Instruction, Listing
from .memory_ops import WINDOW, GlobalMemory, SharedMemory, shared_address
from .operands import U32, Array, bits, predicate, predicate_getter, put_bits, put_predicate, put_wide

PARAMETERS = 0x210  # where a kernel's arguments start among its constants
ARITHMETIC = {**integer_ops.BUILDERS, **float_ops.BUILDERS, **memory_ops.BUILDERS}
NOTHING = {"NOP", "YIELD", "FENCE", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "NANOSLEEP", "DEPBAR"}
ALL_LANES = (1 << 32) - 1


class Step(NamedTuple):
    """One instruction as a warp executed it.

    event: None, or ("load" | "store", bytes), ("copy" | "message", barrier, bytes),
    ("arrive", barrier, arrivals, bytes), ("wait", barrier, phases), ("sync", name, warps),
    ("sync-arrive", name), ("sync-wait", name, arrivals of the block so far).
    """

    index: int
    taken: bool
    event: Any


@dataclass(eq=False)
class Group:
    """Lanes of a warp at one place. `blocked`: says whether they still wait."""

    pc: int
    mask: Array
    lanes: int  # the mask as bits
    blocked: Callable[[], bool] | None = None
    wait: Any = None  # ("bsync", barrier) or ("converge", pc)


def mask_of(lanes: int) -> Array:
    return (np.int64(lanes) >> np.arange(32) & 1).astype(bool)


def lanes_of(mask: Array) -> int:
    return int((mask.astype(np.int64) << np.arange(32)).sum())


class Warp:
    """32 lanes with their registers."""

    def __init__(self, block: Block, index: int, constants: Array) -> None:
        self.block, self.index, self.constants = block, index, constants
        self.r = np.zeros((256, 32), U32)
        self.p = np.zeros((8, 32), bool)
        self.u = np.zeros((64, 1), U32)
        self.up = np.zeros((8, 1), bool)
        self.p[7] = self.up[7] = True
        self.groups = [Group(0, np.ones(32, bool), ALL_LANES)]
        self.reconverge: dict[int, dict[int, int]] = {}
        self.exited = 0
        self.event: Any = None
        self.steps: list[Step] = []

    def special(self, name: str) -> Array:
        """A special register."""
        lane = np.arange(32, dtype=U32)
        block = self.block
        table = {
            "SR_TID.X": lane + U32(32 * self.index),
            "SR_CTAID.X": np.array([block.index], U32),
            "SR_CgaCtaId": np.array([block.rank], U32),
            "SR_LANEID": lane,
            "SRZ": np.zeros(1, U32),
            "SR_TID.Y": np.zeros(1, U32),
            "SR_TID.Z": np.zeros(1, U32),
        }
        return table[name]


class Block:
    def __init__(self, cluster: Cluster, rank: int, warps: int, constants: Array) -> None:
        self.cluster, self.rank, self.index = cluster, rank, rank
        self.shared = SharedMemory()
        self.warps = [Warp(self, i, constants) for i in range(warps)]
        self.arrived: dict[str, int] = {}


class Cluster:
    """A launch's first cluster, alone on the device: it takes every row of the call."""

    def __init__(self, listing: Listing, launch: Launch, memory: GlobalMemory) -> None:
        self.memory = memory
        self.arrived: dict[str, int] = {}
        constants = np.zeros(2048, U32)
        constants[0:3] = [launch.threads, 1, 1]
        constants[3:6] = [launch.cluster, 1, 1]
        constants[0x140 // 4] = int(launch.cluster > 1)
        words = np.frombuffer(launch.parameters, U32)
        constants[PARAMETERS // 4 : PARAMETERS // 4 + len(words)] = words
        self.code = [compile_step(ins, listing) for ins in listing.instructions]
        self.blocks = [
            Block(self, rank, launch.threads // 32, constants) for rank in range(launch.cluster)
        ]

    def run(self) -> None:
        """Until every warp has left the kernel; raises RuntimeError where none can go on."""
        warps = [w for b in self.blocks for w in b.warps]
        with np.errstate(all="ignore"):
            while any(w.groups for w in warps):
                if not any([advance(w, self.code) for w in warps]):
                    stuck = [(w.block.rank, w.index, [g.pc for g in w.groups]) for w in warps]
                    raise RuntimeError(f"no warp can go on: {[s for s in stuck if s[2]]}")


def advance(w: Warp, code: list[Any]) -> bool:
    """Runs a warp until all its lanes wait or have left; whether it did anything."""
    done = False
    while w.groups:
        ready = [g for g in w.groups if g.wait is None and (g.blocked is None or not g.blocked())]
        if not ready:
            return done
        group = ready[0] if len(ready) == 1 else min(ready, key=lambda g: g.pc)
        group.blocked = None
        run_group(w, group, code, alone=len(w.groups) == 1)
        done = True
    return done


def run_group(w: Warp, group: Group, code: list[Any], alone: bool) -> None:
    """Runs lanes until they meet control flow that changes the groups; one step if not alone."""
    full = group.lanes == ALL_LANES
    steps = w.steps
    while True:
        pc = group.pc
        control, fn, guard = code[pc]
        m = None if full else group.mask
        if guard is not None:
            m = guard(w) & group.mask
        if control:
            if fn(w, group, m):
                return
            continue
        w.event = None
        if m is None or m.any():
            fn(w, m)
        steps.append(Step(pc, False, w.event))
        group.pc = pc + 1
        if not alone:
            return


# ---- control flow -------------------------------------------------------------------------------
# A control function returns whether the warp's groups have to be looked at again.


def compile_step(ins: Instruction, listing: Listing) -> tuple[bool, Any, Any]:
    """(is control flow, function, guard) of an instruction."""
    guard = None
    if ins.guard is not None:
        negated, kind, index = ins.guard
        guard = predicate_getter(("!" if negated else "") + f"{kind}{'T' if index == 7 else index}")
    name = ins.base
    if name in NOTHING:
        return False, lambda w, m: None, guard
    if name == "SYNCS":
        return _syncs(ins), _syncs_function(ins), guard
    if name in CONTROL:
        return True, CONTROL[name](ins, listing), guard
    builder = WARP_WIDE.get(name) or ARITHMETIC.get(name) or ARITHMETIC.get(name.removeprefix("U"))
    if builder is None:

        def unknown(w: Warp, m: Any) -> None:
            raise NotImplementedError(f"{ins.address:#x}: {ins.text}")

        return False, unknown, guard
    return False, builder(ins), guard


def _active(group: Group, m: Any) -> Array:
    return group.mask if m is None else m


def _split(w: Warp, group: Group, taken: Array, target: int) -> bool:
    """Sends the lanes of `taken` to another place; whether the groups changed."""
    lanes = lanes_of(taken)
    if lanes == 0 or lanes == group.lanes:
        group.pc = target if lanes else group.pc + 1
        return False
    w.groups.append(Group(target, taken.copy(), lanes))
    group.lanes &= ~lanes
    group.mask = mask_of(group.lanes)
    group.pc += 1
    return True


def _target(ins: Instruction, listing: Listing) -> int:
    label = ins.operands[-1].strip("`()")
    return listing.labels[label]


def branch(ins: Instruction, listing: Listing) -> Any:
    target = _target(ins, listing)
    if "DIV" in ins.modifiers:
        return converge(ins, listing)
    extra = [predicate_getter(o) for o in ins.operands if predicate(o)]
    any_lane = "ANY" in ins.modifiers

    def run(w: Warp, group: Group, m: Any) -> bool:
        taken = _active(group, m)
        for p in extra:
            taken = taken & p(w)
        if any_lane and taken.any():
            taken = group.mask
        w.steps.append(Step(group.pc, bool(taken.any()), None))
        return _split(w, group, taken, target)

    return run


def call(ins: Instruction, listing: Listing) -> Any:
    target = _target(ins, listing)

    def run(w: Warp, group: Group, m: Any) -> bool:
        w.steps.append(Step(group.pc, bool(_active(group, m).any()), None))
        return _split(w, group, _active(group, m), target)

    return run


def ret(ins: Instruction, listing: Listing) -> Any:
    get = bits(ins.operands[0].split()[0])

    def run(w: Warp, group: Group, m: Any) -> bool:
        to = np.unique(get(w)[_active(group, m)])
        assert len(to) == 1, ins.text
        w.steps.append(Step(group.pc, True, None))
        return _split(w, group, _active(group, m), listing.at_address[int(to[0])])

    return run


def leave(ins: Instruction, listing: Listing) -> Any:
    def run(w: Warp, group: Group, m: Any) -> bool:
        going = lanes_of(_active(group, m))
        w.steps.append(Step(group.pc, False, None))
        w.exited |= going
        group.lanes &= ~going
        group.mask = mask_of(group.lanes)
        group.pc += 1
        if group.lanes == 0:
            w.groups.remove(group)
        _release(w)
        return True

    return run


def open_region(ins: Instruction, listing: Listing) -> Any:
    """BSSY: the lanes here meet again at the region's BSYNC."""
    number = int(ins.operands[0][1:])

    def run(w: Warp, group: Group, m: Any) -> bool:
        lanes = lanes_of(_active(group, m))
        members = w.reconverge.setdefault(number, {})
        for lane in range(32):
            if lanes >> lane & 1:
                members[lane] = lanes
        w.steps.append(Step(group.pc, False, None))
        group.pc += 1
        return False

    return run


def break_region(ins: Instruction, listing: Listing) -> Any:
    """BREAK: these lanes will not come to the region's BSYNC."""
    number = int(ins.operands[-1][1:])

    def run(w: Warp, group: Group, m: Any) -> bool:
        going = lanes_of(_active(group, m))
        members = w.reconverge[number]
        for lane in members:
            members[lane] &= ~going
        w.steps.append(Step(group.pc, False, None))
        group.pc += 1
        _release(w)
        return True

    return run


def close_region(ins: Instruction, listing: Listing) -> Any:
    number = int(ins.operands[0][1:])

    def run(w: Warp, group: Group, m: Any) -> bool:
        lane = (group.lanes & -group.lanes).bit_length() - 1
        if w.reconverge[number][lane] & ~w.exited == group.lanes:
            w.steps.append(Step(group.pc, False, None))
            group.pc += 1
            return False
        group.wait = ("bsync", number)
        _release(w)
        return True

    return run


def converge(ins: Instruction, listing: Listing) -> Any:
    """A place where the whole warp has to be together."""

    def run(w: Warp, group: Group, m: Any) -> bool:
        if group.lanes == ALL_LANES & ~w.exited:
            w.steps.append(Step(group.pc, False, None))
            group.pc += 1
            return False
        group.wait = ("converge", group.pc)
        _release(w)
        return True

    return run


def _release(w: Warp) -> None:
    """Joins lanes that have all come to where they meet."""
    waiting = [g for g in w.groups if g.wait is not None]
    for first in waiting:
        if first not in w.groups or first.wait is None:
            continue
        same = [g for g in w.groups if g.wait == first.wait and g.pc == first.pc]
        together = 0
        for g in same:
            together |= g.lanes
        kind, key = first.wait
        if kind == "bsync":
            lane = (first.lanes & -first.lanes).bit_length() - 1
            needed = w.reconverge[key][lane] & ~w.exited
        else:
            needed = ALL_LANES & ~w.exited
        if together & needed == needed:
            w.groups = [g for g in w.groups if g not in same]
            w.steps.append(Step(first.pc, False, None))
            w.groups.append(Group(first.pc + 1, mask_of(together), together))


def block_sync(ins: Instruction, listing: Listing) -> Any:
    name = ".".join(["BAR", *[o for o in ins.operands if o.startswith("0x")][:1]])

    def run(w: Warp, group: Group, m: Any) -> bool:
        block = w.block
        block.arrived[name] = block.arrived.get(name, 0) + 1
        warps = len(block.warps)
        needed = -(-block.arrived[name] // warps) * warps
        w.steps.append(Step(group.pc, False, ("sync", name, warps)))
        group.pc += 1
        group.blocked = lambda: block.arrived[name] < needed
        return True

    return run


def cluster_arrive(ins: Instruction, listing: Listing) -> Any:
    def run(w: Warp, group: Group, m: Any) -> bool:
        cluster = w.block.cluster
        cluster.arrived["cluster"] = cluster.arrived.get("cluster", 0) + 1
        w.steps.append(Step(group.pc, False, ("sync-arrive", "cluster")))
        group.pc += 1
        return False

    return run


def cluster_wait(ins: Instruction, listing: Listing) -> Any:
    def run(w: Warp, group: Group, m: Any) -> bool:
        cluster = w.block.cluster
        total = sum(len(b.warps) for b in cluster.blocks)
        needed = -(-cluster.arrived["cluster"] // total) * total
        own = needed // len(cluster.blocks)
        w.steps.append(Step(group.pc, False, ("sync-wait", "cluster", own)))
        group.pc += 1
        group.blocked = lambda: cluster.arrived["cluster"] < needed
        return True

    return run


def _syncs(ins: Instruction) -> bool:
    return "PHASECHK" in ins.modifiers


def _syncs_function(ins: Instruction) -> Any:
    if "EXCH" in ins.modifiers:
        return memory_ops.barrier_exchange(ins)
    if "ARRIVE" in ins.modifiers:
        return memory_ops.barrier_arrive(ins)
    return _wait(ins)


def _wait(ins: Instruction) -> Any:
    """A wait is traced once, when it succeeds."""
    put, address = put_predicate(ins.operands[0]), shared_address(ins.operands[1])
    parity = bits(ins.operands[2])

    def run(w: Warp, group: Group, m: Any) -> bool:
        active = _active(group, m)
        if not active.any():
            w.steps.append(Step(group.pc, False, None))
            group.pc += 1
            return False
        lane = int(np.argmax(active))
        at, phase = (np.broadcast_to(g(w), (32,))[lane] for g in (address, parity))
        barrier = w.block.shared.barriers[int(at) & WINDOW]
        parity_bit = int(phase) >> 31
        if barrier.phase & 1 == parity_bit:
            group.blocked = lambda: barrier.phase & 1 == parity_bit
            return True
        put(w, np.ones(1, bool), active)
        w.steps.append(Step(group.pc, False, ("wait", int(at) & WINDOW, barrier.phase)))
        group.pc += 1
        return False

    return run


CONTROL: dict[str, Callable[[Instruction, Listing], Any]] = {
    "BRA": branch, "CALL": call, "RET": ret, "EXIT": leave, "BSSY": open_region,
    "BSYNC": close_region, "BREAK": break_region, "WARPSYNC": converge, "BAR": block_sync,
    "UCGABAR_ARV": cluster_arrive, "UCGABAR_WAIT": cluster_wait,
}  # fmt: skip


# ---- across the lanes of a warp -----------------------------------------------------------------


def read_special(ins: Instruction) -> Any:
    if ins.base == "CS2R":
        put_two = put_wide(ins.operands[0])
        return lambda w, m: put_two(w, np.zeros(32, np.uint64), m)
    put, name = put_bits(ins.operands[0]), ins.operands[1]
    return lambda w, m: put(w, w.special(name), m)


def to_uniform(ins: Instruction) -> Any:
    put, get = put_bits(ins.operands[0]), bits(ins.operands[-1])
    return lambda w, m: put(w, get(w)[0 if m is None else int(np.argmax(m))], None)


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
    names = {"MAX": np.max, "MIN": np.min, "OR": np.bitwise_or.reduce, "SUM": np.sum}
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


WARP_WIDE: dict[str, Callable[[Instruction], Any]] = {
    "S2R": read_special, "S2UR": read_special, "CS2R": read_special, "R2UR": to_uniform,
    "SHFL": shuffle, "VOTE": vote, "VOTEU": vote, "REDUX": reduce, "ELECT": elect,
}  # fmt: skip
