"""Loss and all gradients from hidden states, on one thread: ``python -m benchmarks.bench_linear``.

Time is process CPU time of interleaved rounds in one process; peak memory, beyond inputs, is the
resident set's high-water mark of a process that runs one case once. What each case computes is in
its name: papo's give logp, entropy, polarity and the clipped loss with all gradients.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import linear_peers
from benchmarks.harness import Case, environment, time_interleaved, write_json
from benchmarks.shapes import LinearShape
from papo_kernels import Compute, Head, policy_loss, token_stats

# SmolLM2's head: 3 x 116 GFLOP, logits of 384 MiB in float32.
CPU_LINEAR_SHAPES = tuple(
    LinearShape(2048, 576, 49152, dtype) for dtype in (torch.float32, torch.bfloat16)
)
BARE = "three bare products"
BARE_ONE = "one bare product"
OURS = "papo policy_loss"


class Workload:
    """Inputs of one shape."""

    def __init__(self, shape: LinearShape) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape = shape
        self.hidden = torch.randn(shape.rows, shape.hidden, generator=generator).to(shape.dtype)
        weight = torch.randn(shape.vocab, shape.hidden, generator=generator)
        self.weight = (weight * shape.hidden**-0.5).to(shape.dtype)
        self.targets = torch.randint(shape.vocab, (shape.rows,), generator=generator)
        self.advantages = torch.randn(shape.rows, generator=generator)
        self.token_weight = torch.full((shape.rows,), 1 / shape.rows)

    @functools.cached_property
    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the bare products, which pay for no fresh memory after the first round."""
        logits = self.hidden.new_empty(self.shape.rows, self.shape.vocab)
        return logits, torch.empty_like(self.hidden), torch.empty_like(self.weight)

    def bare_logits(self) -> None:
        torch.mm(self.hidden, self.weight.t(), out=self.outputs[0])

    def bare(self) -> None:
        self.bare_logits()
        logits, dhidden, dweight = self.outputs
        torch.mm(logits, self.weight, out=dhidden)
        torch.mm(logits.t(), self.hidden, out=dweight)

    def loss(self, **options: Any) -> Any:
        h, w = (x.detach().requires_grad_() for x in (self.hidden, self.weight))
        inputs = (self.targets, self.advantages, self.token_weight)
        policy_loss(Head(w)(h), *inputs, compute=Compute(**options)).loss.backward()
        return h.grad, w.grad

    def stats(self, logits_dtype: torch.dtype | None = None) -> Any:
        logits, compute = Head(self.weight)(self.hidden), Compute(logits_dtype=logits_dtype)
        with torch.no_grad():
            return token_stats(logits, self.targets, compute=compute)

    def statistics_loss(self) -> Any:
        """Any differentiable loss of the statistics: the logits are computed a second time."""
        h, w = (x.detach().requires_grad_() for x in (self.hidden, self.weight))
        stats = token_stats(Head(w)(h), self.targets)
        (stats.logp.sum() + stats.entropy.sum()).backward()
        return h.grad, w.grad


def make_cases(work: Workload) -> list[Case]:
    """Bare products, ours, and the peers that are installed."""
    cases = [
        Case(BARE, work.bare),
        Case(BARE_ONE, work.bare_logits),
        Case(OURS, work.loss),
        Case(f"{OURS}, 64 MiB", functools.partial(work.loss, chunk_bytes=64 * 2**20)),
        Case("papo token_stats fwd", work.stats),
        Case("papo token_stats fwd+bwd", work.statistics_loss),
    ]
    if work.shape.dtype.itemsize == 2:
        half = functools.partial(work.loss, logits_dtype=work.shape.dtype)
        cases.append(Case(f"{OURS}, half logits", half))
        half = functools.partial(work.stats, work.shape.dtype)
        cases.append(Case("papo token_stats fwd, half logits", half))
    cases += linear_peers.linear_cases(work.hidden, work.weight, work.targets)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        cases.append(Case("torch F.linear_cross_entropy chunked (loss only)", _chunked(work)))
    return cases


def _chunked(work: Workload) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
    def run() -> tuple[Tensor | None, Tensor | None]:
        h, w = (x.detach().requires_grad_() for x in (work.hidden, work.weight))
        options = torch.nn.LinearCrossEntropyOptions()
        F.linear_cross_entropy(h, w, work.targets, options=options).backward()
        return h.grad, w.grad

    return run


# ---- peak memory --------------------------------------------------------------------------------


def _resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_here(shape: LinearShape, name: str) -> float:
    """MiB by which one run of a case raises this process's resident set, results included."""
    work = Workload(shape)
    (case,) = (case for case in make_cases(work) if case.name == name)
    small = LinearShape(8, shape.hidden, 64, shape.dtype)
    (warm,) = (case for case in make_cases(Workload(small)) if case.name == name)
    warm.run()  # imports and code pages are not the case's memory
    Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    before = _resident("VmRSS")
    result = case.run()
    del result
    return _resident("VmHWM") - before


def peak_in_a_process(shape: LinearShape, name: str) -> float:
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_linear",
        "--peak",
        name,
        "--only",
        shape.name,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


# ---- the command --------------------------------------------------------------------------------


def times(shape: LinearShape, rounds: int) -> dict[str, dict[str, float]]:
    cases = make_cases(Workload(shape))
    time_interleaved(cases, rounds, warmup=1)
    ms = {case.name: case.ms for case in cases}
    figures = {}
    for name in ms:
        forward = name.startswith("papo") and name.split(",")[0].endswith(" fwd")
        bare = ms[BARE_ONE if forward else BARE]
        figures[name] = {
            "ms": ms[name],
            "of its bare products": ms[name] / bare,
            "of papo's loss": ms[name] / ms[OURS],
        }
    return figures


def peaks(shape: LinearShape) -> dict[str, dict[str, float]]:
    names = [case.name for case in make_cases(Workload(shape))]
    return {name: {"peak MiB": peak_in_a_process(shape, name)} for name in names}


def print_table(title: str, figures: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    for name, row in figures.items():
        cells = "".join(f"{key} {value:10.2f}   " for key, value in row.items())
        print(f"{name:<56}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="a substring of the shapes to run")
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/linear-*.json"
    )
    parser.add_argument("--peak", metavar="CASE", help="print one case's peak memory and stop")
    args = parser.parse_args()

    torch.set_num_threads(1)
    shapes = [shape for shape in CPU_LINEAR_SHAPES if args.only in shape.name]
    if args.peak:
        print(peak_here(shapes[0], args.peak))
        return
    results = {}
    for shape in shapes:
        figures = times(shape, args.rounds)
        for name, peak in peaks(shape).items():
            figures[name] |= peak
        results[shape.name] = figures
        print_table(shape.name, figures)
    record = {
        "environment": environment(),
        "clock": "process CPU time, one thread, median of interleaved rounds",
        "rounds": args.rounds,
        "results": results,
    }
    if args.save:
        print("wrote", write_json("linear", record).name)


if __name__ == "__main__":
    main()
