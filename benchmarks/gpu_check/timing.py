"""The four shapes, one family of kernels: statistics and loss with its gradient, beside a copy."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.gpu_check import rehearsal, target
from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_check.worker import LOST
from benchmarks.gpu_workload import Workload, rates
from benchmarks.harness import Case, Stopwatch, measure
from benchmarks.shapes import Shape

ROUNDS = 9
# Reads and writes of the logits in each case.
PASSES = {"copy": 2, "stats": 1, "loss": 2}


def multiprocessors() -> int:
    if rehearsal.active():
        return 1
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


def cycles_per_row(ms: float, mhz: float, rows: int) -> float:
    """Cycles of one multiprocessor for a row, where all of them share the rows."""
    return ms * 1e3 * mhz * multiprocessors() / rows


def timed(shape: Shape, backend: str, stopwatch: Stopwatch) -> dict[str, Any]:
    """Every case's milliseconds, rate, share of the copy's rate, clock and cycles a row."""
    work = Workload(shape, target.device())
    cases = [
        Case("copy", work.restore),
        Case("stats", lambda: work.stats(backend)),
        Case("loss", lambda: work.loss(backend), work.restore),
    ]
    alive = measure(cases, target.rounds(ROUNDS), stopwatch, target.rounds(3))
    copy = next((case for case in alive if case.name == "copy"), None)
    found: dict[str, Any] = {c.name: {"failed": c.failure} for c in cases if c.failure}
    for case in alive:
        mhz = statistics.median(case.mhz)
        found[case.name] = {
            **case.spread,
            **(
                rates(case.ms, PASSES[case.name] * shape.bytes, copy.ms, 2 * shape.bytes)
                if copy
                else {}
            ),
            "SM MHz": mhz,
            "cycles/row": cycles_per_row(case.ms, mhz, shape.rows),
            "peak MiB": case.peak_mib,
        }
    return found


def run(notes: Notes, family: str) -> int:
    shapes: dict[str, Any] = {}
    stopwatch = target.stopwatch()
    for shape in target.timed_shapes():
        shapes[shape.name] = found = timed(shape, target.backend_of(family), stopwatch)
        notes.put(shapes=shapes)
        for name, figure in found.items():
            print(f"{family} {shape.name} {name}: {figure}", flush=True)
        if target.context_lost():
            return LOST
    return int(any("failed" in figure for found in shapes.values() for figure in found.values()))
