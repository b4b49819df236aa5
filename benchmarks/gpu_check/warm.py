"""Compiles what the Triton stages will run, on all cores, into Triton's own cache, while the
extension is built. Nothing is measured or checked here.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterable
from typing import NamedTuple

import torch

from benchmarks.gpu_check import rehearsal, smoke, sweep, target, tiles
from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_workload import Workload
from benchmarks.harness import one_line
from benchmarks.shapes import Shape

NICENESS = 5  # behind the compilers of the build, which everything waits for


class Job(NamedTuple):
    """A shape, and the configuration that is forced; none: the table's."""

    shape: Shape
    config: str = ""


def jobs() -> list[list[Job]]:
    """What the smoke stage runs, which takes longest, and what is timed and swept. Jobs that may
    lead to the same code are one child's, which then compiles it once."""
    found = []
    for n, v, _ in () if rehearsal.active() else smoke.CASES:
        found += [[Job(Shape(n, v, dtype))] for dtype in (torch.bfloat16, torch.float32)]
    swept: dict[str, list[Job]] = {}
    for shape in sweep.swept_shapes():
        whole = Shape(min(shape.rows, sweep.WHOLE_ROWS), shape.vocab, shape.dtype)
        for config in ("", *tiles.triton_configs(shape.dtype, shape.vocab)):
            swept.setdefault(config, []).append(Job(whole, config))
    found += swept.values()
    return found[:1] if rehearsal.active() else found


def compile_all(part: Iterable[Job]) -> None:
    """A child's part. What does not compile fails again, and is recorded, in its own stage."""
    os.nice(NICENESS)
    for job in part:
        variables = {"PAPO_TRITON_CONFIG": job.config} if job.config else {}
        with target.forced(variables):
            try:
                work = Workload(job.shape, target.device())
                work.restore()
                work.stats("triton")
                work.loss("triton")
                if not job.config:
                    work.stats_backward("triton")
                    narrow = torch.empty_like(work.logits, dtype=torch.bfloat16)
                    work.loss_into(work.logits.float(), narrow, "triton")
            except Exception as error:
                print(job, one_line(error), flush=True)


def run(notes: Notes) -> int:
    """Children of this process, which itself never touches the device."""
    found, cores = jobs(), os.cpu_count() or 1
    fork = multiprocessing.get_context("fork")
    parts = [itertools.chain(*found[i::cores]) for i in range(min(cores, len(found)))]
    children = [fork.Process(target=compile_all, args=(part,)) for part in parts]
    for child in children:
        child.start()
    for child in children:
        child.join()
    notes.put(jobs=sum(map(len, found)), exits=[child.exitcode for child in children])
    return int(any(child.exitcode for child in children))
