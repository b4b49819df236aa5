"""What the stages run on: the GPU and its kernels, or in a rehearsal what stands in for them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.gpu_check import rehearsal
from benchmarks.gpu_workload import GPU
from benchmarks.harness import GpuStopwatch, HostStopwatch, Stopwatch
from benchmarks.shapes import GPU_LINEAR_SHAPES, GPU_TIMED, LinearShape, Shape
from papo_kernels.backends import tuning


class Family(NamedTuple):
    """Kernels that are tried apart: a backend and the variables that choose among its kernels."""

    backend: str
    variables: tuple[tuple[str, str], ...] = ()
    stand_in: str = "reference"  # in a rehearsal


FAMILIES = {
    "resident": Family("cuda", (("PAPO_KERNEL", "resident"),), stand_in="reference"),
    # Chosen for many rows only, unless it is forced.
    "statistics": Family(
        "cuda",
        (("PAPO_KERNEL", "resident"), ("PAPO_STATS_TILE", "2,3,2")),
        stand_in="reference",
    ),
    "streamed": Family("cuda", (("PAPO_KERNEL", "streamed"),), stand_in="cpu"),
    "triton": Family("triton", stand_in="triton"),
}


def backend_of(family: str) -> str:
    """The backend that serves a family."""
    chosen = FAMILIES[family]
    return chosen.stand_in if rehearsal.active() else chosen.backend


def device() -> torch.device:
    """Where the tensors live."""
    return torch.device("cpu") if rehearsal.active() else GPU


def stopwatch() -> Stopwatch:
    return HostStopwatch() if rehearsal.active() else GpuStopwatch()


def timed_shapes() -> Sequence[Shape]:
    """The shapes that are timed and tuned for."""
    if rehearsal.active():
        return (Shape(2, 300, torch.bfloat16), Shape(1, 520, torch.bfloat16))
    return GPU_TIMED


def linear_shapes() -> Sequence[LinearShape]:
    if rehearsal.active():
        return (LinearShape(8, 16, 64, torch.bfloat16),)
    return GPU_LINEAR_SHAPES


def rounds(full: int) -> int:
    """Measured rounds, or runs that warm up."""
    return 1 if rehearsal.active() else full


@contextlib.contextmanager
def forced(variables: dict[str, str]) -> Iterator[None]:
    """These environment variables hold, and papo_kernels knows it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    _forget()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _forget()


def context_lost() -> bool:
    """Whether the device no longer serves this process, as after an error in a kernel."""
    if rehearsal.active():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=GPU).item()
    except Exception:
        return True
    return False


def _forget() -> None:
    """Makes the launchers read the variables again."""
    tuning.forced.cache_clear()
    launch = sys.modules.get("papo_kernels.backends.triton.launch")
    if launch is not None:  # loaded where Triton serves
        launch.clear_config()
