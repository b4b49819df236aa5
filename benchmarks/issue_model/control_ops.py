"""Control flow of sm_90: branches, places where lanes meet, barriers of blocks and clusters, waits.

A builder's function takes (warp, group, mask) and returns whether the warp's groups have to be
looked at again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .listing import Instruction, Listing
from .memory_ops import WINDOW, shared_address
from .operands import Array, bits, predicate, predicate_getter, put_predicate
from .warps import ALL_LANES, Group, Step, Warp, lanes_of, mask_of


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


def branch_by_table(ins: Instruction, listing: Listing) -> Any:
    """BRX: to an address from the jump table, the same in all lanes."""
    register, offset = ins.operands[0].split()[:2]
    get, base = bits(register), ins.address + 16 + int(offset, 16)

    def run(w: Warp, group: Group, m: Any) -> bool:
        to = np.unique(np.broadcast_to(get(w), 32)[_active(group, m)])
        assert len(to) == 1, ins.text
        w.steps.append(Step(group.pc, True, None))
        return _split(w, group, _active(group, m), listing.at_address[int(to[0]) + base])

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


def wait(ins: Instruction, listing: Listing) -> Any:
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
    "BRA": branch, "BRX": branch_by_table, "CALL": call, "RET": ret, "EXIT": leave,
    "BSSY": open_region, "BSYNC": close_region, "BREAK": break_region, "WARPSYNC": converge,
    "BAR": block_sync, "UCGABAR_ARV": cluster_arrive, "UCGABAR_WAIT": cluster_wait, "WAIT": wait,
}  # fmt: skip
