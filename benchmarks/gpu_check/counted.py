"""What a profiler looks at: one launch of one kernel, warmed up, between a start and a stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_check import rehearsal, target
from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_workload import Workload
from benchmarks.shapes import Shape


class Counted(NamedTuple):
    """A family's kernel, and the bytes an element of the logits is read and written by."""

    family: str
    call: str
    read: int
    written: int


CASES = {
    "resident-stats": Counted("resident", "stats", 2, 0),
    "resident-loss": Counted("resident", "loss", 2, 2),
    "triton-stats": Counted("triton", "stats", 2, 0),
    "resident-narrowing": Counted("resident", "narrowing", 4, 2),
}


def shape() -> Shape:
    """A part of the main shape, with less for the profiler to save and restore; rows enough for
    the kernel of statistics."""
    return (
        Shape(2, 300, torch.bfloat16) if rehearsal.active() else Shape(2304, 151936, torch.bfloat16)
    )


def model_bytes(case: str) -> tuple[int, int]:
    """Bytes that a case must read and write."""
    elements = shape().rows * shape().vocab
    return CASES[case].read * elements, CASES[case].written * elements


def call_of(case: str, work: Workload) -> Callable[[], Any]:
    """The case's call, which launches its kernel and nothing else that is long."""
    counted = CASES[case]
    backend = target.backend_of(counted.family)
    if counted.call == "stats":
        return lambda: work.stats(backend)
    if counted.call == "loss":
        return lambda: work.loss_into(work.scratch, work.scratch, backend)
    wide = work.logits.float()
    return lambda: work.loss_into(wide, work.scratch, backend)


def run(notes: Notes, case: str) -> int:
    work = Workload(shape(), target.device())
    call = call_of(case, work)
    work.restore()
    call()
    work.restore()
    if rehearsal.active():
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0
