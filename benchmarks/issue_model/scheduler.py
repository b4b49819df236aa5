"""Cycles of traced warps on one multiprocessor of sm_90.

Four schedulers issue one instruction a cycle each. An instruction waits for the stall count of the
one before it, for the scoreboards its encoding names and for its unit; the figures of the units are
in `UNITS`. Copies and stores share one queue to memory; barriers work as in the kernel. Not
modeled: instruction fetch, bank conflicts, register banks, the caches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .listing import Instruction
from .peers import CLUSTER_LATENCY, Peers, Sent
from .warps import Step

# Unit: cycles that an instruction occupies it in its scheduler. "fma" is two half-rate pipes, of
# which "heavy", integer multiplications, use one.
UNITS = {"fma": 2, "heavy": 2, "alu": 2, "xu": 8, "fp64": 2, "lsu": 2, "other": 0}
LATENCY = {
    "MUFU": 20, "LDS": 28, "SHFL": 24, "F2F": 22, "SYNCS": 28, "LDG": 700, "LDC": 28, "F2I": 22,
    "I2F": 22, "REDUX": 24, "S2R": 24, "STG": 10,
}  # fmt: skip
DEFAULT_LATENCY = 20
READ_LATENCY = 10
TAKEN_BRANCH = 8
WAKE = 20  # from the end of a barrier's phase to the next instruction of who waits for it
STORE_BACKLOG = 1500  # cycles of queued memory traffic beyond which stores wait
FMA = {"FFMA", "FADD", "FMUL"}
HEAVY = {"IMAD", "HFMA2", "UIMAD"}
XU = {"MUFU", "F2I", "I2F", "F2F", "FLO", "POPC", "BREV"}
LSU = {"LDS", "STS", "LDG", "STG", "SHFL", "STAS", "SYNCS", "LDC", "REDUX"}
FP64 = {"DFMA", "DADD", "DMUL", "DSETP"}
OTHER = {"BRA", "BRX", "BSYNC", "BSSY", "BREAK", "CALL", "RET", "WARPSYNC", "NOP", "VOTE"}
OTHER |= {"BAR", "EXIT"}
# Cycles of the multiprocessor's path to shared memory, 128 bytes a cycle, by the width of a lane.
SHARED_CYCLES = {16: 4, 8: 2, 4: 1, 2: 1, 1: 1}


@dataclass(frozen=True)
class Cost:
    """What the model needs of one instruction."""

    unit: str
    stall: int
    write: int
    read: int
    waits: tuple[int, ...]
    latency: int
    shared: int


def cost_of(instruction: Instruction) -> Cost:
    name = instruction.base
    if name in FMA:
        unit = "fma"
    elif name in HEAVY:
        unit = "heavy"
    elif name in XU:
        unit = "xu"
    elif name in LSU:
        unit = "lsu"
    elif name in FP64:
        unit = "fp64"
    elif name in OTHER or name[0] == "U":
        unit = "other"
    else:
        unit = "alu"
    width = next((w for n, w in (("128", 16), ("64", 8)) if n in instruction.modifiers), 4)
    shared = SHARED_CYCLES[width] if name in ("LDS", "STS", "STG", "LDG") else int(name == "SHFL")
    waits = tuple(b for b in range(6) if instruction.wait >> b & 1)
    return Cost(
        unit,
        max(1, instruction.stall),
        instruction.write_barrier,
        instruction.read_barrier,
        waits,
        LATENCY.get(name, DEFAULT_LATENCY),
        shared,
    )


@dataclass
class _Barrier:
    """Phases end when their arrivals and bytes are in: `ended` has the cycle of each."""

    expected: int
    pending: int
    bytes: int = 0
    latest: float = 0.0
    ended: list[float] = field(default_factory=list)

    def add(self, arrivals: int, size: int, at: float) -> None:
        self.pending -= arrivals
        self.bytes += size
        self.latest = max(self.latest, at)
        if self.pending == 0 and self.bytes == 0:
            self.ended.append(self.latest)
            self.pending, self.latest = self.expected, 0.0


@dataclass
class _Warp:
    block: int
    steps: list[Step]
    at: int = 0
    ready: float = 0.0
    scoreboard: list[float] = field(default_factory=lambda: [0.0] * 8)
    waited: float = 0.0


@dataclass
class Result:
    """cycles: until the last warp has left; issued: instructions; busy: cycles of each unit, all
    schedulers together; waiting: cycles that each warp of block 0 waited for barriers."""

    cycles: float
    issued: int
    busy: Counter[str]
    waiting: list[float]


class Multiprocessor:
    """blocks: for each block its warps' steps; barriers: arrivals that each barrier expects;
    bytes_per_cycle: this multiprocessor's share of the memory rate, infinite for none;
    memory_latency: cycles; sent: what crosses the cluster of each block."""

    def __init__(
        self,
        costs: list[Cost],
        blocks: list[list[list[Step]]],
        barriers: dict[int, int],
        bytes_per_cycle: float = float("inf"),
        memory_latency: float = 800.0,
        sent: Sent | None = None,
    ) -> None:
        self.costs = costs
        self.warps = [_Warp(b, steps) for b, warps in enumerate(blocks) for steps in warps if steps]
        self.queues = [[w for i, w in enumerate(self.warps) if i % 4 == s] for s in range(4)]
        self.barriers = [{k: _Barrier(n, n) for k, n in barriers.items()} for _ in blocks]
        self.peers = [Peers(sent or Sent(), barriers) for barriers in self.barriers]
        self.syncs: list[dict[str, list[float]]] = [{} for _ in blocks]
        self.asleep: dict[tuple[int, str], list[_Warp]] = {}
        self.rate, self.latency = bytes_per_cycle, memory_latency
        self.memory = self.shared = 0.0
        self.free = [dict.fromkeys([*UNITS, "fma2"], 0.0) for _ in range(4)]
        self.busy: Counter[str] = Counter()

    def run(self) -> Result:
        now, issued, end = 0.0, 0, 0.0
        last: list[_Warp | None] = [None] * 4
        while any(self.queues):
            following = float("inf")
            progress = False
            for s in range(4):
                warp, soonest = self._pick(s, last[s], now)
                if warp is None:
                    following = min(following, soonest)
                    continue
                self._issue(s, warp, now)
                last[s], progress = warp, True
                issued += 1
                if warp.at == len(warp.steps):
                    self.queues[s].remove(warp)
                    end = max(end, now)
            if not progress and following == float("inf"):
                stuck = [(w.block, i, w.steps[w.at]) for i, w in enumerate(self.warps)
                         if w.at < len(w.steps)]  # fmt: skip
                raise RuntimeError(f"every warp waits: {stuck}")
            now = now + 1 if progress else max(now + 1, following)
        return Result(end, issued, self.busy, [w.waited for w in self.warps if w.block == 0])

    def _pick(self, s: int, last: _Warp | None, now: float) -> tuple[_Warp | None, float]:
        """The warp to issue now, the one of before if it can; else when one could."""
        soonest = float("inf")
        if last is not None and last.at < len(last.steps) and self._when(s, last, now) <= now:
            return last, now
        for warp in self.queues[s]:
            when = warp.ready if warp.ready > now else self._when(s, warp, now)
            if when <= now:
                return warp, now
            soonest = min(soonest, when)
        return None, soonest

    def _when(self, s: int, warp: _Warp, now: float) -> float:
        when = warp.ready
        step = warp.steps[warp.at]
        cost = self.costs[step.at]
        for b in cost.waits:
            when = max(when, warp.scoreboard[b])
        unit, free = cost.unit, self.free[s]
        if unit == "fma":
            when = max(when, min(free["fma"], free["fma2"]))
        elif unit == "heavy":
            when = max(when, free["fma"])
        elif unit == "xu":
            when = max(when, free["xu"] - 2 * UNITS["xu"])
        elif unit != "other":
            when = max(when, free[unit])
        if cost.shared:
            when = max(when, self.shared - 16)
        if step.event is not None:
            when = max(when, self._event_ready(warp, step.event, now))
        return when

    def _event_ready(self, warp: _Warp, event: Any, now: float) -> float:
        kind = event[0]
        if kind == "wait":
            ended = self.barriers[warp.block][event[1]].ended
            if len(ended) < event[2]:
                return float("inf")
            done = ended[event[2] - 1] if event[2] else 0.0
            return done + WAKE if done > warp.ready else done
        if kind == "sync-wait":
            arrivals = self.syncs[warp.block].get(event[1], [])
            if len(arrivals) < event[2]:
                return float("inf")
            return arrivals[event[2] - 1] + CLUSTER_LATENCY
        if kind == "store":
            return self.memory - STORE_BACKLOG
        return 0.0

    def _issue(self, s: int, warp: _Warp, now: float) -> None:
        step = warp.steps[warp.at]
        cost = self.costs[step.at]
        free, unit = self.free[s], cost.unit
        start = now
        if unit == "fma":
            pipe = "fma2" if free["fma2"] <= now else "fma"
            free[pipe] = now + 2
        elif unit == "heavy":
            free["fma"] = now + 2
        elif unit == "xu":
            start = max(now, free["xu"])
            free["xu"] = start + UNITS["xu"]
        elif unit != "other":
            free[unit] = now + UNITS[unit]
        self.busy[unit] += UNITS[unit]
        if cost.shared:
            self.shared = max(now, self.shared) + cost.shared
            start = max(start, self.shared - cost.shared)
            self.busy["shared"] += cost.shared
        if step.event is not None:
            if step.event[0] == "wait":
                warp.waited += now - warp.ready
            self._event(warp, step.event, now)
        if cost.write != 7:
            warp.scoreboard[cost.write] = max(warp.scoreboard[cost.write], start + cost.latency)
        if cost.read != 7:
            warp.scoreboard[cost.read] = max(warp.scoreboard[cost.read], start + READ_LATENCY)
        warp.ready = max(warp.ready, now + cost.stall + (TAKEN_BRANCH if step.taken else 0))
        warp.at += 1

    def _event(self, warp: _Warp, event: Any, now: float) -> None:
        kind = event[0]
        barriers = self.barriers[warp.block]
        if kind == "arrive":
            barriers[event[1]].add(event[2], event[3], now + READ_LATENCY)
        elif kind == "message":
            self.peers[warp.block].message(*event[1:], now)
        elif kind == "broadcast":
            self.peers[warp.block].broadcast(*event[1:], now)
        elif kind in ("copy", "load", "store"):
            size = event[2] if kind == "copy" else event[1]
            self.memory = max(now, self.memory) + size / self.rate
            self.busy["memory"] += size
            if kind == "copy":
                barriers[event[1]].add(0, -event[2], self.memory + self.latency)
        elif kind in ("sync", "sync-arrive"):
            arrivals = self.syncs[warp.block].setdefault(event[1], [])
            arrivals.append(now)
            if kind == "sync":
                self._sync(warp, event, arrivals)

    def _sync(self, warp: _Warp, event: Any, arrivals: list[float]) -> None:
        """The last to arrive lets the others go on."""
        waiting = self.asleep.setdefault((warp.block, event[1]), [])
        waiting.append(warp)
        warp.ready = float("inf")
        if len(waiting) == event[2]:
            for w in waiting:
                w.ready = max(arrivals) + WAKE
            waiting.clear()
