"""Our kernels beside their peers: `bench_gpu`, a shape at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_gpu, peers
from benchmarks.gpu_check import rehearsal, target
from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_check.worker import LOST, work_folder
from benchmarks.shapes import GPU_COMPILED, LinearShape, Shape

ROUNDS = 10
# What a rehearsal must not import although it may be installed: it takes seconds.
_PEERS = ("trl", "liger_kernel", "quack", "cut_cross_entropy", "verl")


def shapes() -> list[Shape | LinearShape]:
    if rehearsal.active():
        return [*target.timed_shapes()[:1], *target.linear_shapes()]
    return bench_gpu.ordered()


def run(notes: Notes, healthy: str, wheels: str = "") -> int:
    """`healthy`: our backends that have not failed before, comma-separated; `wheels`: a folder of
    wheels to import the peers from."""
    into = work_folder() / "wheels"
    unpacked = peers.use_wheels(Path(wheels), into) if wheels else []
    if rehearsal.active():
        absent = [name for name in _PEERS if not (into / name).exists()]
        sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    notes.put(wheels=unpacked)
    names = ["cpu"]
    if not rehearsal.active():
        names = [name for name in bench_gpu.able() if name in healthy.split(",")]
    compiled = tuple(target.timed_shapes()[:1]) if rehearsal.active() else GPU_COMPILED
    bench = bench_gpu.Bench(
        target.device(), target.stopwatch(), names, compiled, target.rounds(ROUNDS)
    )
    results: dict[str, Any] = {}
    for i, shape in enumerate(shapes()):
        results[shape.name] = bench.attempt(shape)
        notes.put(results=results, unavailable=peers.unavailable)
        bench_gpu.print_table(shape.name, results[shape.name])
        if target.context_lost():
            return LOST
        if i == 0:
            notes.put(**{"host overhead, us": bench.host_overhead()})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0
