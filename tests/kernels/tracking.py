"""What a call does, inside custom operations too: its matrix products and its allocations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear")


def products(run: Callable[[], Any]) -> list[tuple[int, int, int]]:
    """(m, k, n) of every matrix product that `run` makes, in order."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        run()
    shapes = []
    for event in trace.events():
        if event.name in PRODUCTS:
            matrices = [s for s in event.input_shapes if len(s) == 2]
            # mm(a, b, out) and addmm(c, a, b, ..., out).
            a, b = matrices[:2] if event.name == "aten::mm" else matrices[1:3]
            assert a[1] == b[0], (event.name, event.input_shapes)
            shapes.append((a[0], a[1], b[1]))
    return shapes


def flops(run: Callable[[], Any]) -> int:
    """Multiplications and additions of all matrix products of `run`."""
    return sum(2 * m * k * n for m, k, n in products(run))


class Memory(NamedTuple):
    """Bytes of tensors on the CPU, over what there was before; `largest` is of one allocation."""

    peak: int
    after: int
    largest: int


def memory(run: Callable[[], Any]) -> Memory:
    """Every allocation and release of torch's CPU allocator while `run` runs. What `run` returns
    counts as allocated still."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = run()
    now = peak = largest = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            now += event.nbytes()
            peak, largest = max(peak, now), max(largest, event.nbytes())
    del kept
    return Memory(peak, now, largest)
