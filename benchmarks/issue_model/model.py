"""A call's kernel, run and timed: instruction counts by role and function, cycles per row, and what
they come to on a device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .build import Build, Launch
from .listing import Listing, parse
from .machine import Cluster
from .memory_ops import GlobalMemory
from .peers import Sent
from .scheduler import Multiprocessor, Result, cost_of
from .source_map import SourceMap
from .warps import Step

# The arrays of a call, in the order of capture.cpp.
ARRAYS = (
    "logits", "dlogits", "targets", "state", "logp", "entropy", "polarity", "lse", "state_out",
    "advantages", "token_weight", "old_logp", "token_loss", "weight", "ratio", "clip_side",
)  # fmt: skip
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Functions whose instructions are counted by the element, by the first phase that has one of the
# functions an instruction lies in; all others are once a row.
PHASES = {
    "maximum": ("meet_stage", "largest"),
    "sums": ("add_stages", "add_stage_carefully", "batch"),
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


def numbers_of(call: Call, logits: Any) -> Any:
    """Logits in the bits of their type as float64."""
    if call.dtype == "bf16":
        logits = (logits.astype(np.uint32) << 16).view(np.float32)
    return logits.astype(np.float64)


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


def check(call: Call, memory: GlobalMemory) -> None:
    """Raises ArithmeticError where the run's log-probabilities are not those of its logits: then
    an instruction was misread, and the branches taken mean nothing."""
    if call.task == "state":
        return
    x = numbers_of(call, logits_of(call))
    targets = memory.arrays[ARRAYS.index("targets")].view(np.int64)[: call.rows]
    top = x.max(axis=1)
    total = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
    want = x[np.arange(call.rows), targets] - total
    got = memory.arrays[ARRAYS.index("logp")].view(np.float32)[: call.rows]
    if not np.allclose(got, want, rtol=1e-5, atol=1e-5):
        raise ArithmeticError(f"log-probabilities {got}, expected {want}")


@dataclass
class Trace:
    """What the warps of the cluster's first block did, for a number of rows."""

    launch: Launch
    listing: Listing
    rows: int
    steps: list[list[Step]]
    barriers: dict[int, int]
    sent: Sent
    memory: GlobalMemory = field(repr=False)


def shortened(build: Build, call: Call, rows: int) -> Launch:
    """The call's launch with another number of rows in its parameters: the kernel is that of the
    whole call. The number's places are those that follow it from one call to another."""

    def launch_of(count: int) -> Launch:
        return build.launches(call.task, call.dtype, call.out, count, call.columns)[0]

    launch, other = launch_of(call.rows), launch_of(call.rows + 1)
    words = np.frombuffer(launch.parameters, np.int64).copy()
    words[(words == call.rows) & (np.frombuffer(other.parameters, np.int64) == call.rows + 1)] = (
        rows
    )
    return replace(launch, parameters=words.tobytes())


def trace(build: Build, call: Call, rows: int, listing: Listing | None = None) -> Trace:
    """Runs the call's kernel, but on `rows` rows with one cluster."""
    launch = shortened(build, call, rows)
    listing = listing or parse(build.listing(launch.symbol))
    few = replace(call, rows=rows)
    cluster = Cluster(listing, launch, memory_of(few))
    cluster.run()
    check(few, cluster.memory)
    block = cluster.blocks[0]
    barriers = {at: b.expected for at, b in block.shared.barriers.items()}
    steps = [w.steps for w in block.warps]
    sent = Sent(launch.cluster, row_bytes(steps), block.shared.broadcasts)
    return Trace(launch, listing, rows, steps, barriers, sent, cluster.memory)


def row_bytes(steps: list[list[Step]]) -> int:
    """What the warps of a block send of a row: each its first message."""
    messages = ([s.event for s in w if s.event and s.event[0] == "message"] for w in steps)
    return sum(found[0][2] for found in messages if found)


@dataclass
class Pace:
    """Cycles on one multiprocessor: a row of each of its blocks in the steady state; `rows` rows of
    each, from the start; and, of the steady state, the share of issue slots and of every unit that
    is used."""

    row: float
    start: float
    issue: float
    units: dict[str, float]


def pace(long: Trace, short: Trace | None, blocks: int, bytes_per_cycle: float) -> Pace:
    """The steady state is what the longer trace takes more than the shorter one."""
    costs = [cost_of(i) for i in long.listing.instructions]

    def run(t: Trace) -> Result:
        return Multiprocessor(
            costs, [t.steps] * blocks, t.barriers, bytes_per_cycle, sent=t.sent
        ).run()

    a = run(long)
    b = run(short) if short else Result(0.0, 0, Counter(), [])
    span = a.cycles - b.cycles
    used = {unit: (n - b.busy[unit]) / span for unit, n in a.busy.items()}
    units = {unit: used.get(unit, 0.0) / 4 for unit in ("alu", "xu", "lsu", "fp64")}
    units["fma"] = (used["fma"] + used["heavy"]) / 8
    units["shared"] = used.get("shared", 0.0)
    rows = long.rows - (short.rows if short else 0)
    return Pace(span / rows, a.cycles, (a.issued - b.issued) / span / 4, units)


@dataclass
class Modeled:
    """floor: bytes at the copy rate; compute: as if memory were free but for its latency; modeled:
    with the multiprocessor's share of the copy rate. ms of the whole call without its launch, and
    cycles per row of a cluster."""

    call: Call
    launch: Launch
    registers: int
    clusters: int
    ms: dict[str, float]
    cycles: dict[str, float]
    compute: Pace
    per_warp: list[float]
    per_element: dict[str, float]
    once_a_row: list[float]
    tree: Counter[tuple[str, ...]]


def model(build: Build, call: Call, device: Device, rows: int) -> Modeled:
    """rows: how many a cluster is followed for; the steady state is that of the second half."""
    launch = build.launches(call.task, call.dtype, call.out, call.rows, call.columns)[0]
    clusters = launch.blocks // launch.cluster
    rounds, left = divmod(call.rows, clusters)
    rows = min(rows, rounds)
    long = trace(build, call, rows)
    short = trace(build, call, rows // 2, long.listing) if rows > 1 else None
    on_one = min(launch.blocks_per_multiprocessor, -(-launch.blocks // device.multiprocessors))
    active = min(device.multiprocessors, launch.blocks // on_one)
    share = device.copy_rate / device.clock / active
    floor = call.bytes_moved() / device.copy_rate
    ms = {"floor": floor * 1e3}
    cycles = {"floor": floor * device.clock * clusters / call.rows}
    # Rows left over after the last whole round: few blocks, with the memory to themselves.
    last = pace(long, short, 1, float("inf")).row if left else 0.0
    paces = {
        "compute": pace(long, short, on_one, float("inf")),
        "modeled": pace(long, short, on_one, share),
    }
    for name, p in paces.items():
        cycles[name] = p.row
        ms[name] = (p.start + p.row * (rounds - rows) + last) / device.clock * 1e3
    per_row = counts(build, long, short)
    elements = -(-call.columns // launch.cluster)
    per_element, once = by_phase(per_row, elements)
    per_warp = [float(sum(c.values())) for c in per_row]
    return Modeled(
        call, launch, int(build.registers[launch.symbol]), clusters, ms, cycles, paces["compute"],
        per_warp, per_element, once, sum(per_row, Counter()),
    )  # fmt: skip


def counts(build: Build, long: Trace, short: Trace | None) -> list[Counter[tuple[str, ...]]]:
    """Per warp of the block: instructions a row by the functions that they lie in."""
    sources = SourceMap(build.root)
    paths = [sources.path(i) for i in long.listing.instructions]
    rows = long.rows - (short.rows if short else 0)
    found = []
    for w, steps in enumerate(long.steps):
        total = Counter(paths[s.at] for s in steps)
        if short:
            total.subtract(Counter(paths[s.at] for s in short.steps[w]))
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
