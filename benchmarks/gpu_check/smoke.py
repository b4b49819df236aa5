"""Every kernel of one family on small inputs, without pytest: a line a case.

Outputs start as NaN, results are compared with the eager float64 backend on the same device. A
watchdog ends the process with a traceback where a case takes too long.
"""

from __future__ import annotations

import faulthandler
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import deterministic

from benchmarks.gpu_check import rehearsal, target
from benchmarks.gpu_check.build import loaded_variant
from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_check.worker import LOST
from benchmarks.gpu_workload import Workload
from benchmarks.harness import one_line
from benchmarks.shapes import Shape

WATCHDOG = 10  # seconds of a case, compilation included

# (N, V, what it covers). The last ones are left to runs without a sanitizer.
CASES = (
    (3, 7, "a row shorter than a 16-byte word's worth of lanes"),
    (5, 1023, "odd rows, no row but the first aligned"),
    (2, 32000, "one or two cluster ranks"),
    (150, 1000, "more rows than multiprocessors: a persistent block takes a second row"),
    (1, 151937, "odd and long: every rank of a cluster, ragged at both ends"),
    (600, 4096, "rows enough for one program each"),
    (64, 151936, "the main vocabulary"),
    (8, 300000, "rows that only the largest clusters hold in float32"),
)
SMALL = 5
# Of rows that several slices hold, each in one buffer: what the kernel of statistics takes.
STATISTICS_CASES = (
    (3, 32000, "two slices: a row for every team"),
    (5, 37001, "odd rows, no row but the first aligned"),
    (40, 32001, "more rows than a look-ahead of 32"),
    (600, 40000, "more rows than blocks"),
)
REHEARSED = ((2, 130, "interpreted, a row takes some 50 ms"),)


class Difference(NamedTuple):
    """How far an output is from float64, as a multiple of what is allowed."""

    share: float
    where: str


def poison() -> None:
    """From here on, what torch allocates without a value is NaN."""
    torch.set_deterministic_debug_mode("warn")
    deterministic.fill_uninitialized_memory = True


def compare(name: str, actual: Tensor, exact: Tensor, by_row: bool = False) -> Difference:
    """An output against float64: 1e-5 of its size, of the row's largest for a gradient, which may
    also be rounded to its dtype."""
    if not actual.is_floating_point():
        return Difference(float((actual != exact).any()) * 2.0, name)
    exact = exact.double()
    size = exact.abs().amax(1, keepdim=True) if by_row else 1.0 + exact.abs()
    info = torch.finfo(actual.dtype)
    rounding = info.eps * exact.abs() + info.tiny if by_row else 0.0
    share = (actual.double() - exact).abs() / (1e-5 * size + rounding + 1e-30)
    share = share.nan_to_num(nan=torch.inf)  # NaN where no thread has written
    worst = int(share.argmax())
    at = f"{name}[{worst}]: {actual.flatten()[worst].item():.9g}, expected "
    return Difference(float(share.max()), at + f"{exact.flatten()[worst].item():.9g}")


def differences(work: Workload, backend: str) -> Iterator[Difference]:
    """Of every output of every call."""
    exact = work.stats("reference")
    for name, x, y in zip(exact._fields, work.stats(backend), exact, strict=True):
        yield compare(f"stats {name}", x, y)
    gradients = [work.stats_backward(b) for b in (backend, "reference")]
    yield compare("stats gradient", *gradients, by_row=True)
    outputs, gradients = [], []
    for name in (backend, "reference"):
        work.restore()
        outputs.append(work.loss(name))
        gradients.append(work.scratch.clone())
    for name, x, y in zip(outputs[0]._fields, *outputs, strict=True):
        yield compare(f"loss {name}", x.detach(), y.detach())
    yield compare("loss gradient", *gradients, by_row=True)
    wide = work.logits.float()
    narrow = [torch.empty_like(work.logits, dtype=torch.bfloat16) for _ in range(2)]
    work.loss_into(wide, narrow[0], backend)
    exact_gradient = torch.empty_like(wide)
    work.loss_into(wide, exact_gradient, "reference")
    yield compare("float32 to bfloat16 gradient", narrow[0], exact_gradient, by_row=True)


def line_of(work: Workload, backend: str) -> str:
    """A case's outcome."""
    try:
        worst = max(differences(work, backend), key=lambda difference: difference.share)
    except Exception as error:
        return f"ERROR {one_line(error)}"
    if worst.share > 1.0:
        return f"WRONG {worst.share:.3g} of what is allowed: {worst.where}"
    return f"ok, error at most {worst.share:.2g} of what is allowed"


def run(notes: Notes, family: str, mode: str = "spin") -> int:
    """`mode`: "spin" on the build whose waits trap; "sanitized" on the measured build, few cases
    and no watchdog, for a sanitizer that slows everything down."""
    notes.put(variant=loaded_variant(), cases={})
    poison()
    cases = STATISTICS_CASES if family == "statistics" else CASES
    cases = REHEARSED if rehearsal.active() else cases[: SMALL if mode == "sanitized" else None]
    backend, failed = target.backend_of(family), 0
    lines: dict[str, str] = {}
    for (n, v, _), dtype in itertools.product(cases, (torch.bfloat16, torch.float32)):
        shape = Shape(n, v, dtype)
        notes.put(now=shape.name)
        if mode == "spin":
            faulthandler.dump_traceback_later(WATCHDOG, exit=True)
        lines[shape.name] = line_of(Workload(shape, target.device()), backend)
        faulthandler.cancel_dump_traceback_later()
        print(f"{family} {shape.name}: {lines[shape.name]}", flush=True)
        notes.put(cases=lines, now="")
        if not lines[shape.name].startswith("ok"):
            failed = 1
            if target.context_lost():
                print(f"{family}: the device no longer serves this process")
                return LOST
    return failed
