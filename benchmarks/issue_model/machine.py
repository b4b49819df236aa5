"""Runs one cluster of a compiled kernel: every warp of every block, lane by lane.

The result of a run is what each warp executed, in order, with what the timing model has to know of
it. Branches are taken as the data decide; a wait ends when its barrier's phase does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import control_ops, float_ops, integer_ops, memory_ops, warp_ops
from .build import Launch
from .listing import Instruction, Listing
from .memory_ops import GlobalMemory, SharedMemory
from .operands import U32, Array, predicate_getter
from .warps import ALL_LANES, Group, Step, Warp

PARAMETERS = 0x210  # where a kernel's arguments start among its constants
BUILDERS = {
    **integer_ops.BUILDERS,
    **float_ops.BUILDERS,
    **memory_ops.BUILDERS,
    **warp_ops.BUILDERS,
}
NOTHING = {"NOP", "YIELD", "FENCE", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "NANOSLEEP", "DEPBAR"}


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
        self.jump_table = np.frombuffer(listing.jump_table, U32)
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


def compile_step(ins: Instruction, listing: Listing) -> tuple[bool, Any, Any]:
    """(is control flow, function, guard) of an instruction."""
    guard = None
    if ins.guard is not None:
        negated, kind, index = ins.guard
        guard = predicate_getter(("!" if negated else "") + f"{kind}{'T' if index == 7 else index}")
    name = ins.base
    if name in NOTHING:
        return False, lambda w, m: None, guard
    control = "WAIT" if "PHASECHK" in ins.modifiers else name
    if control in control_ops.CONTROL:
        return True, control_ops.CONTROL[control](ins, listing), guard
    if name == "SYNCS":
        name = "EXCH" if "EXCH" in ins.modifiers else "ARRIVE"
    builder = BUILDERS.get(name) or BUILDERS.get(name.removeprefix("U"))
    if builder is None:

        def unknown(w: Warp, m: Any) -> None:
            raise NotImplementedError(f"{ins.address:#x}: {ins.text}")

        return False, unknown, guard
    return False, builder(ins), guard
