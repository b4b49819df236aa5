"""The fused head taken apart: each product alone, the loss kernel by rows, and the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check import rehearsal, target
from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_check.worker import LOST
from benchmarks.gpu_workload import LinearWorkload, Workload
from benchmarks.harness import Case, Stopwatch, measure
from benchmarks.shapes import LinearShape, Shape

ROUNDS = 3
KERNEL_ROWS = (768, 1408, 2048, 4096)


def product_cases(work: LinearWorkload) -> list[Case]:
    """Each product alone, written in its own dtype and in float32."""
    hidden, weight = work.hidden, work.weight
    dlogits = torch.empty(
        work.shape.rows, work.shape.vocab, dtype=hidden.dtype, device=hidden.device
    ).normal_()
    operands = {
        "logits": (hidden, weight.T),
        "dhidden": (dlogits, weight),
        "dweight": (dlogits.T, hidden),
    }

    def wide(a: Tensor, b: Tensor) -> Callable[[], Any]:
        if rehearsal.active():  # a CPU's product has no out_dtype
            return lambda: torch.mm(a, b).float()
        return lambda: torch.mm(a, b, out_dtype=torch.float32)

    cases = []
    for name, (a, b) in operands.items():
        cases.append(Case(f"{name}, {str(a.dtype)[6:]}", lambda a=a, b=b: torch.mm(a, b)))
        cases.append(Case(f"{name}, float32", wide(a, b)))
    return cases


def kernel_cases(shape: LinearShape, backend: str) -> list[Case]:
    """The loss kernel on float32 logits with a narrow gradient, at several numbers of rows."""
    rows = (2, 4) if rehearsal.active() else KERNEL_ROWS
    work = Workload(Shape(max(rows), shape.vocab, torch.float32), target.device())
    dlogits = torch.empty_like(work.logits, dtype=shape.dtype)
    return [
        Case(
            f"loss kernel, {n} rows",
            lambda n=n: work.loss_into(work.logits[:n], dlogits[:n], backend),
        )
        for n in rows
    ]


def figures(shape: LinearShape, cases: list[Case], stopwatch: Stopwatch) -> dict[str, Any]:
    """Times; TFLOP/s of products, and of three of them for the whole; GB/s of the kernel."""
    measure(cases, target.rounds(ROUNDS), stopwatch, warmup=1)
    found: dict[str, Any] = {}
    for case in cases:
        if case.failure:
            found[case.name] = {"failed": case.failure}
            continue
        found[case.name] = {**case.spread, "peak MiB": case.peak_mib}
        if case.name.startswith("loss kernel"):
            moved = int(case.name.split()[2]) * shape.vocab * (4 + shape.dtype.itemsize)
            found[case.name]["GB/s"] = moved / case.ms / 1e6
        else:
            products = 3 if "three" in case.name or "policy_loss" in case.name else 1
            found[case.name]["TFLOP/s"] = products * shape.flops / case.ms / 1e9
    return found


def run(notes: Notes) -> int:
    shapes: dict[str, Any] = {}
    stopwatch = target.stopwatch()
    for shape in target.linear_shapes():
        found = shapes[shape.name] = {}
        work = LinearWorkload(shape, target.device())
        # What needs no kernel of ours comes first.
        makers: tuple[Callable[[], list[Case]], ...] = (
            lambda work=work: [Case("three products", work.products)],
            lambda work=work: product_cases(work),
            lambda shape=shape: kernel_cases(shape, target.backend_of("resident")),
            lambda work=work: [Case("policy_loss of the head", work.loss)],
        )
        for make in makers:
            found.update(figures(shape, make(), stopwatch))
            notes.put(shapes=shapes)
            if target.context_lost():
                return LOST
        print(shape.name, found, flush=True)
    return int(any("failed" in figure for found in shapes.values() for figure in found.values()))
