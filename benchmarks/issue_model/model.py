"""A call's kernel, run and timed: instruction counts by role and function, cycles per row, and what
they come to on a device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .build import Build, Launch
from .listing import Listing, parse
from .machine import Cluster, Step
from .memory_ops import GlobalMemory
from .scheduler import Multiprocessor, Result, cost_of
from .source_map import SourceMap

# The arrays of a call, in the order of capture.cpp.
ARRAYS = (
    "logits", "dlogits", "targets", "state", "logp", "entropy", "polarity", "lse", "state_out",
    "advantages", "token_weight", "old_logp", "token_loss", "weight", "ratio", "clipped",
)  # fmt: skip
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Functions whose instructions are counted by the element; all others are once a row.
PHASES = {
    "sums": ("scan_stage", "scan_words", "scan_slice", "batch"),
    "gradient": ("write_gradient",),
}


@dataclass(frozen=True)
class Device:
    """clock in cycles a second, copy_rate in bytes a second."""

    name: str = "H200"
    multiprocessors: int = 132
    clock: float = 1.98e9
    copy_rate: float = 4.3e12


@dataclass
class Call:
    """task, dtype, out: see Build.launches; rows x columns logits."""

    task: str
    rows: int
    columns: int
    dtype: str = "bf16"
    out: str = "bf16"

    def bytes_moved(self) -> int:
        """Read once, and the gradient written once."""
        size = BYTES[self.dtype] + (0 if self.task == "stats" else BYTES[self.out])
        return self.rows * self.columns * size


def as_bytes(array: Any) -> Any:
    """Flat bytes with some room behind."""
    flat = np.ascontiguousarray(array).view(np.uint8).ravel()
    whole = np.zeros(flat.size // 16 * 16 + 64, np.uint8)
    whole[: flat.size] = flat
    return whole


def logits_of(call: Call, seed: int = 0) -> Any:
    """Random logits in the bits of their type: normal, of deviation 3."""
    x = (np.random.default_rng(seed).standard_normal((call.rows, call.columns)) * 3).astype(
        np.float32
    )
    if call.dtype == "fp32":
        return x
    if call.dtype == "fp16":
        return x.astype(np.float16)
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def memory_of(call: Call) -> GlobalMemory:
    """The arrays of a call: random logits and targets, advantages +-1, weights 1."""
    rng = np.random.default_rng(1)
    arrays = {i: as_bytes(np.zeros(call.rows * 6, np.float64)) for i in range(len(ARRAYS))}
    name = {n: i for i, n in enumerate(ARRAYS)}
    arrays[name["logits"]] = as_bytes(logits_of(call))
    size = np.uint32 if call.out == "fp32" else np.uint16
    arrays[name["dlogits"]] = as_bytes(np.zeros((call.rows, call.columns), size))
    arrays[name["targets"]] = as_bytes(rng.integers(0, call.columns, call.rows))
    arrays[name["advantages"]] = as_bytes(rng.choice([-1.0, 1.0], call.rows).astype(np.float32))
    arrays[name["token_weight"]] = as_bytes(np.ones(call.rows, np.float32))
    arrays[name["old_logp"]] = as_bytes(np.full(call.rows, -12.0, np.float32))
    return GlobalMemory(arrays)


@dataclass
class Trace:
    """What the warps of the cluster's first block did, for a number of rows."""

    launch: Launch
    listing: Listing
    rows: int
    steps: list[list[Step]]
    barriers: dict[int, int]
    memory: GlobalMemory = field(repr=False)


def trace(build: Build, call: Call, rows: int, listing: Listing | None = None) -> Trace:
    """Runs the call's kernel on `rows` rows with one cluster."""
    launch = build.launches(call.task, call.dtype, call.out, rows, call.columns)[0]
    listing = listing or parse(build.listing(launch.symbol))
    few = Call(call.task, rows, call.columns, call.dtype, call.out)
    cluster = Cluster(listing, launch, memory_of(few))
    cluster.run()
    block = cluster.blocks[0]
    barriers = {at: b.expected for at, b in block.shared.barriers.items()}
    return Trace(launch, listing, rows, [w.steps for w in block.warps], barriers, cluster.memory)


def time_of(t: Trace, blocks: int, bytes_per_cycle: float) -> Result:
    """Cycles of `blocks` such blocks on one multiprocessor."""
    costs = [cost_of(i) for i in t.listing.instructions]
    return Multiprocessor(costs, [t.steps] * blocks, t.barriers, bytes_per_cycle).run()


@dataclass
class Modelled:
    """cycles are per row of one cluster, in its steady state."""

    call: Call
    launch: Launch
    registers: int
    clusters: int
    floor_ms: float
    model_ms: float
    compute_ms: float
    cycles: float
    compute_cycles: float
    floor_cycles: float
    utilisation: float
    busy: dict[str, float]
    per_warp: list[float]
    per_element: dict[str, float]
    once_a_row: list[float]
    tree: Counter[tuple[str, ...]]


def model(build: Build, call: Call, device: Device, rows: int = 6) -> Modelled:
    """rows: how many a cluster is followed for; the steady state is that of the second half."""
    launch = build.launches(call.task, call.dtype, call.out, call.rows, call.columns)[0]
    clusters = launch.blocks // launch.cluster
    mine = -(-call.rows // clusters)
    rows = min(rows, mine)
    half = rows // 2
    long = trace(build, call, rows)
    short = trace(build, call, half, long.listing) if half else None
    on_one = min(launch.blocks_per_multiprocessor, -(-launch.blocks // device.multiprocessors))
    active = min(device.multiprocessors, launch.blocks // on_one)
    rate = device.copy_rate / device.clock / active

    def cycles(bytes_per_cycle: float) -> tuple[float, float, Result, Result | None]:
        a = time_of(long, on_one, bytes_per_cycle)
        b = time_of(short, on_one, bytes_per_cycle) if short else None
        each = (a.cycles - b.cycles) / (rows - half) if b else a.cycles
        return each, a.cycles + each * (mine - rows), a, b

    each, total, *_ = cycles(rate)
    alone, total_alone, a, b = cycles(float("inf"))
    span = a.cycles - (b.cycles if b else 0.0)
    issued = a.issued - (b.issued if b else 0)
    busy = {
        unit: (count - (b.busy[unit] if b else 0)) / span / (1 if unit == "shared" else 4)
        for unit, count in a.busy.items()
        if unit not in ("memory", "other")
    }
    floor = call.bytes_moved() / device.copy_rate
    per_row = counts(build, long, short)
    elements = min(call.columns, -(-call.columns // launch.cluster))
    per_element, once = by_phase(per_row, elements)
    return Modelled(
        call, launch, int(build.registers[launch.symbol]), clusters, floor * 1e3,
        total / device.clock * 1e3, total_alone / device.clock * 1e3, each, alone,
        floor * device.clock / mine, issued / span / 4, busy,
        [sum(c.values()) for c in per_row], per_element, once,
        sum(per_row, Counter()),
    )  # fmt: skip


def counts(build: Build, long: Trace, short: Trace | None) -> list[Counter[tuple[str, ...]]]:
    """Per warp of the block: instructions a row by the functions that they lie in."""
    sources = SourceMap(build.root)
    paths = [sources.path(i) for i in long.listing.instructions]
    rows = long.rows - (short.rows if short else 0)
    found = []
    for w, steps in enumerate(long.steps):
        total = Counter(paths[s.index] for s in steps)
        if short:
            total.subtract(Counter(paths[s.index] for s in short.steps[w]))
        found.append(Counter({k: v / rows for k, v in total.items() if v}))
    return found


def by_phase(
    per_row: list[Counter[tuple[str, ...]]], elements: int
) -> tuple[dict[str, float], list[float]]:
    """Instructions per element of each phase, and once a row of each warp."""
    per_element: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    once = []
    for counter in per_row:
        rest = 0.0
        for path, count in counter.items():
            phase = next((p for p, names in PHASES.items() if set(names) & set(path)), None)
            if phase is None:
                rest += count
            else:
                per_element[phase] += 32 * count / elements
        once.append(rest)
    return per_element, once
