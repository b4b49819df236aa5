"""Tries tiles: each candidate is forced, checked against torch and timed.

The notes name the candidate under way, so that a process that dies on one is begun anew behind it.
Of the CUDA kernels the loss's tile is found first, by the time of loss and statistics together, as
it decides which kernel the statistics may take; then the statistics' with the best of these forced.
A candidate whose statistics and loss differ in a bit of logp is disqualified.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_check import rehearsal, target, tiles
from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_check.worker import LOST
from benchmarks.gpu_workload import Workload
from benchmarks.harness import Case, Stopwatch, measure, one_line, produced
from benchmarks.shapes import Shape
from papo_kernels import Compute, policy_loss
from papo_kernels.backends import tuning

ROUNDS = 5
# Seconds of a candidate, which takes some 30 ms, and a few seconds where Triton compiles it.
WATCHDOG = {"tile": 5, "stats": 5, "config": 15}
DEFAULT = "default"
NOISE = 0.99  # two times whose ratio is between this and 1 count as the same
# A winner is tried at the next multiple, for padded vocabularies; the second for short rows.
COLUMNS_STEPS = (8192, 64)
SAMPLED_ROWS = 8
WHOLE_ROWS = 1024  # enough for a row to be one program's, for which Triton has compiled


class Task(NamedTuple):
    """What is swept at one shape.

    Attributes:
        shape: the logits.
        field: of the table's configuration that the candidates are values of.
        variable: that forces a candidate.
        timed: the calls whose time counts.
        variables: forced besides, for DEFAULT too.
    """

    shape: Shape
    field: str
    variable: str
    timed: tuple[str, ...]
    variables: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.field} {self.shape.name}"

    def forcing(self, candidate: str) -> dict[str, str]:
        """The variables of a candidate; of DEFAULT, those that the others are forced besides, so
        that all are timed beside the same."""
        own = {} if candidate == DEFAULT else {self.variable: candidate}
        return {**self.variables, **own}


def ranked(tried: dict[str, dict[str, Any]]) -> list[tuple[str, float]]:
    """The candidates that count, best first, with their milliseconds."""
    valid = [(name, result["ms"]) for name, result in tried.items() if "ms" in result]
    return sorted(valid, key=lambda pair: pair[1])


def winner(tried: dict[str, dict[str, Any]]) -> str:
    """The best candidate that was forced; DEFAULT where what is derived is clearly better, or
    nothing else ran."""
    times = dict(ranked(tried))
    derived = times.pop(DEFAULT, float("inf"))
    best = min(times, key=times.__getitem__, default=DEFAULT)
    return best if best != DEFAULT and times[best] * NOISE <= derived else DEFAULT


def swept_shapes() -> list[Shape]:
    """One of each number of columns: a tile must not depend on the rows."""
    first: dict[int, Shape] = {}
    for shape in target.timed_shapes():
        first.setdefault(shape.vocab, shape)
    return list(first.values())


class Sweep:
    """One family's sweep, in the notes of its stage.

    Args:
        name: of the stage, before a candidate in the names of planned faults.
        backend: that is called.
    """

    def __init__(self, notes: Notes, name: str, backend: str) -> None:
        self.notes, self.name, self.backend = notes, name, backend
        self.stopwatch: Stopwatch = target.stopwatch()
        notes.data.setdefault("tasks", {})
        if under_way := notes.data.get("now"):
            task, candidate = under_way
            tried = notes.data["tasks"][task]["tried"]
            tried.setdefault(candidate, {"error": "the process died on it"})
        notes.put(devices=list(tuning.device_names(target.device())), now=None)

    def run(self, task: Task, candidates: Sequence[str], work: Workload) -> str:
        """Tries what has not been tried yet; the best candidate, DEFAULT where there is none."""
        shape = task.shape
        entry = self.notes.data["tasks"].setdefault(
            task.name,
            {
                "field": task.field,
                "backend": "cuda" if task.field != "config" else "triton",
                "dtype": str(shape.dtype).removeprefix("torch."),
                "columns": shape.vocab,
                "last column": shape.vocab,
                "tried": {},
            },
        )
        expected = Expected(work)
        for candidate in (DEFAULT, *candidates):
            if candidate not in entry["tried"]:
                self._try(task, candidate, work, expected, entry["tried"])
        best = winner(entry["tried"])
        if best != DEFAULT and "padded" not in entry:
            entry["padded"] = True
            self.notes.put()  # a process that dies on it is not to try it again
            entry["last column"] = self._last_column(task, best)
        self.notes.put(now=None)
        return best

    def _try(
        self,
        task: Task,
        candidate: str,
        work: Workload,
        expected: Expected,
        tried: dict[str, dict[str, Any]],
    ) -> None:
        self.notes.put(now=(task.name, candidate))
        rehearsal.maybe_fail(f"{self.name}|{task.name}|{candidate}")
        faulthandler.dump_traceback_later(WATCHDOG[task.field], exit=True)
        with target.forced(task.forcing(candidate)):
            try:
                fault = expected.fault(work, self.backend)
                tried[candidate] = {"error": fault} if fault else self._time(task, work)
            except Exception as error:
                tried[candidate] = {"error": one_line(error)}
        lost = target.context_lost()
        faulthandler.cancel_dump_traceback_later()
        self.notes.put(now=None)
        if lost:
            raise SystemExit(LOST)

    def _time(self, task: Task, work: Workload) -> dict[str, Any]:
        """Milliseconds, their sum first."""
        cases = {
            "stats": Case("stats", lambda: work.stats(self.backend)),
            "loss": Case("loss", lambda: work.loss(self.backend), work.restore),
        }
        chosen = [cases[name] for name in task.timed]
        measure(chosen, target.rounds(ROUNDS), self.stopwatch, warmup=1)
        failed = [case.failure for case in chosen if case.failure]
        if failed:
            return {"error": failed[0]}
        return {"ms": sum(case.ms for case in chosen), **{case.name: case.ms for case in chosen}}

    def _last_column(self, task: Task, best: str) -> int:
        """The largest number of columns that the winner may serve: padded ones where it runs."""
        shape = task.shape
        step = COLUMNS_STEPS[shape.vocab < COLUMNS_STEPS[0]]
        padded = -(-shape.vocab // step) * step
        rows = min(shape.rows, WHOLE_ROWS)
        work = Workload(Shape(rows, padded, shape.dtype), target.device())
        faulthandler.dump_traceback_later(WATCHDOG[task.field], exit=True)
        with target.forced(task.forcing(best)):
            try:
                fault = Expected(work).fault(work, self.backend)
            except Exception as error:
                fault = one_line(error)
        faulthandler.cancel_dump_traceback_later()
        if target.context_lost():
            raise SystemExit(LOST)
        return shape.vocab if fault else padded


class Expected:
    """What every candidate must give for a workload: logp of all rows by torch, and the gradient
    of a few rows in float64."""

    def __init__(self, work: Workload) -> None:
        self.logp = work.plain
        step = max(1, work.shape.rows // SAMPLED_ROWS)
        self.rows = torch.arange(0, work.shape.rows, step, device=work.logits.device)
        self.gradient = _reference_gradient(work, self.rows)

    def fault(self, work: Workload, backend: str) -> str:
        """What is wrong with the statistics and the loss as they are now; empty if nothing is."""
        stats = work.stats(backend)
        work.restore()
        loss = work.loss(backend)
        if not torch.equal(stats.logp, loss.logp):
            return "logp of statistics and loss differ in a bit"
        if not _all_close(stats.logp, self.logp, 1e-5 * (1.0 + self.logp.abs())):
            return "logp is wrong"
        info = torch.finfo(work.logits.dtype)
        size = self.gradient.abs().amax(1, keepdim=True)
        allowed = 1e-5 * size + info.eps * self.gradient.abs() + info.tiny
        if not _all_close(work.scratch[self.rows], self.gradient, allowed):
            return "the gradient is wrong"
        return ""


def _all_close(actual: Tensor, expected: Tensor, allowed: Tensor) -> bool:
    """Whether every element is; NaN is not."""
    return bool(((actual.double() - expected).abs() <= allowed).all())


def _reference_gradient(work: Workload, rows: Tensor) -> Tensor:
    logits = work.logits[rows].double()
    out = policy_loss(
        produced(logits),
        work.targets[rows],
        work.advantages[rows].double(),
        work.token_weight[rows].double(),
        old_logp=work.old_logp[rows].double(),
        weighting=work.weighting,
        compute=Compute("reference", inplace=True),
    )
    out.loss.backward()
    return logits


# ---- the families -------------------------------------------------------------------------------


def sweep_cuda(sweep: Sweep) -> None:
    for shape in swept_shapes():
        work = Workload(shape, target.device())
        resident = {"PAPO_KERNEL": "resident"}
        first = Task(shape, "tile", "PAPO_TILE", ("loss", "stats"), resident)
        best = sweep.run(first, tiles.loss_tiles(shape.vocab, shape.dtype.itemsize), work)
        tile = {} if best == DEFAULT else {"PAPO_TILE": best}
        second = Task(shape, "stats", "PAPO_STATS_TILE", ("stats",), {**resident, **tile})
        sweep.run(second, tiles.stats_tiles(), work)


def sweep_triton(sweep: Sweep) -> None:
    for shape in swept_shapes():
        task = Task(shape, "config", "PAPO_TRITON_CONFIG", ("stats", "loss"), {})
        candidates = tiles.triton_configs(shape.dtype, shape.vocab)
        sweep.run(task, candidates, Workload(shape, target.device()))


def run(notes: Notes, family: str) -> int:
    """`family`: "cuda" or "triton"."""
    if family == "triton":
        sweep_triton(Sweep(notes, "sweep-triton", "triton"))
    else:
        sweep_cuda(Sweep(notes, "sweep-cuda", target.backend_of("resident")))
    for name, entry in notes.data["tasks"].items():
        print(name, ranked(entry["tried"])[:10])
    return 0
