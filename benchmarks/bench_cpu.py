"""CPU kernels beside torch: ``python -m benchmarks.bench_cpu``; see README.md for the protocol.

Also collected by ``pytest benchmarks --benchmark-only``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, environment, produced, time_interleaved, write_json
from benchmarks.reference import logp_entropy_float32
from benchmarks.shapes import CPU_SHAPES, Shape
from papo_kernels import Compute, Objective, policy_loss, token_stats
from papo_kernels.backends import extension as _native

try:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax
except ImportError:
    selective_log_softmax = entropy_from_logits = None

CLIP = 0.2
ENTROPY_COEF = 0.01


def trl_logp_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return selective_log_softmax(logits, targets), entropy_from_logits(logits)


def loss_of(logp: Tensor, entropy: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    """The clipped surrogate with an entropy bonus."""
    ratio = torch.exp(logp - old_logp)
    clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
    surrogate = -torch.minimum(ratio * advantages, clipped * advantages)
    return (surrogate - ENTROPY_COEF * entropy).sum() / logp.numel()


class Workload:
    """Inputs of one shape. ``scratch`` is a copy of the logits that in-place cases may spoil."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(shape.rows, shape.vocab, generator=generator) * 2
        self.logits = logits.to(shape.dtype)
        self.scratch = self.logits.clone()
        self.targets = torch.randint(shape.vocab, (shape.rows,), generator=generator)
        self.advantages = torch.randn(shape.rows, generator=generator)
        self.old_logp = token_stats(self.logits, self.targets).logp
        self.token_weight = torch.full((shape.rows,), 1 / shape.rows)

    def restore(self) -> None:
        self.scratch.copy_(self.logits)

    def stats(self) -> Any:
        return token_stats(self.logits, self.targets)

    def loss_inplace(self, entropy_coef: float) -> Tensor:
        logits = produced(self.scratch)
        out = policy_loss(
            logits,
            self.targets,
            self.advantages,
            self.token_weight,
            old_logp=self.old_logp,
            objective=Objective(entropy_coef=entropy_coef),
            compute=Compute(inplace=True),
        )
        out.loss.backward()
        return self.scratch

    def loss_with(self, stats: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        logits = self.logits.detach().requires_grad_()
        loss_of(*stats(logits, self.targets), self.old_logp, self.advantages).backward()
        return logits.grad

    def loss_compiled(self, compiled: Callable[..., Tensor]) -> Tensor:
        logits = self.logits.detach().requires_grad_()
        compiled(logits, self.targets, self.old_logp, self.advantages).backward()
        return logits.grad


def make_cases(shape: Shape) -> list[Case]:
    """Floors, ours, torch.compile, eager and, where installed, TRL, over one workload."""
    work = Workload(shape)
    words = work.logits.view(torch.int32)
    compiled_stats = torch.compile(logp_entropy_float32, dynamic=False)
    compiled_loss = torch.compile(
        lambda z, t, old, adv: loss_of(*logp_entropy_float32(z, t), old, adv), dynamic=False
    )
    no_grad = torch.no_grad()

    def plain(fn: Callable[[], Any]) -> Callable[[], Any]:
        return no_grad(fn)

    cases = [
        Case("read floor", lambda: words.max()),
        Case("copy floor", lambda: work.scratch.copy_(work.logits)),
        Case("papo stats", plain(work.stats)),
        Case("papo loss+grad", lambda: work.loss_inplace(0.0), work.restore),
        Case("papo loss+grad, entropy", lambda: work.loss_inplace(ENTROPY_COEF), work.restore),
        Case("compile fwd", plain(lambda: compiled_stats(work.logits, work.targets))),
        Case("compile fwd+bwd", lambda: work.loss_compiled(compiled_loss)),
        Case("eager fwd", plain(lambda: logp_entropy_float32(work.logits, work.targets))),
        Case("eager fwd+bwd", lambda: work.loss_with(logp_entropy_float32)),
    ]
    if selective_log_softmax is not None:
        cases += [
            Case("trl fwd", plain(lambda: trl_logp_entropy(work.logits, work.targets))),
            Case("trl fwd+bwd", lambda: work.loss_with(trl_logp_entropy)),
        ]
    return cases


def ratios(ms: dict[str, float]) -> dict[str, float]:
    """The figures that the goals are stated in."""
    out = {
        "stats / read floor": ms["papo stats"] / ms["read floor"],
        "compile fwd / stats": ms["compile fwd"] / ms["papo stats"],
        "compile fwd+bwd / loss+grad": ms["compile fwd+bwd"] / ms["papo loss+grad"],
        "compile fwd+bwd / loss+grad, entropy": ms["compile fwd+bwd"]
        / ms["papo loss+grad, entropy"],
    }
    if "trl fwd" in ms:
        out["trl fwd / stats"] = ms["trl fwd"] / ms["papo stats"]
        out["trl fwd+bwd / loss+grad"] = ms["trl fwd+bwd"] / ms["papo loss+grad"]
    return out


def threads_case(shape: Shape, rounds: int) -> dict[str, float]:
    """Wall time of the statistics, of the loss and of reading the logits on one thread and on two,
    after an operation on two threads (the cache's overwriting), as in training."""
    work = Workload(shape)
    words = work.logits.view(torch.int32)

    def prepare() -> None:
        work.restore()
        torch.set_num_threads(2)

    def on(threads: int, run: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> None:
            torch.set_num_threads(threads)
            run()

        return timed

    cases = [
        Case(f"{name} {n}", on(n, run), prepare)
        for name, run in (
            ("stats", torch.no_grad()(work.stats)),
            ("loss+grad", lambda: work.loss_inplace(0.0)),
            ("read", words.max),
        )
        for n in (1, 2)
    ]
    time_interleaved(cases, rounds, clock=time.perf_counter)
    torch.set_num_threads(1)
    ms = {case.name: case.ms for case in cases}
    return {
        **ms,
        **{
            f"{name} speedup": ms[f"{name} 1"] / ms[f"{name} 2"]
            for name in ("stats", "loss+grad", "read")
        },
    }


def print_table(results: dict[str, dict[str, dict[str, float]]]) -> None:
    names = list(results)
    rows = list(next(iter(results.values()))["ms"])
    width = max(map(len, rows)) + 2
    print("ms (x read floor)".ljust(width) + "".join(f"{n:>26}" for n in names))
    for row in rows:
        cells = (
            f"{r['ms'][row]:>16.2f} ({r['ms'][row] / r['ms']['read floor']:5.2f}x)"
            for r in results.values()
        )
        print(row.ljust(width) + "".join(f"{c:>26}" for c in cells))
    for row in next(iter(results.values()))["ratios"]:
        print(f"{row}: " + "  ".join(f"{r['ratios'][row]:.2f}" for r in results.values()))
    for name in ("stats", "loss+grad", "read"):
        threads = (r["two threads, wall"][f"{name} speedup"] for r in results.values())
        print(f"{name}, two threads / one: " + "  ".join(f"{x:.2f}" for x in threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="a substring of the shapes to run")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cpu-*.json")
    args = parser.parse_args()

    torch.set_num_threads(1)
    results = {}
    for shape in (s for s in CPU_SHAPES if args.only in s.name):
        cases = make_cases(shape)
        time_interleaved(cases, args.rounds)
        ms = {case.name: case.ms for case in cases}
        threads = threads_case(shape, args.rounds)
        results[shape.name] = {"ms": ms, "ratios": ratios(ms), "two threads, wall": threads}
        torch.compiler.reset()
    print_table(results)
    record = {
        "environment": {**environment(), "isa": _native.cpu_isa()},
        "clock": "process CPU time, one thread, median of interleaved cold-cache rounds",
        "rounds": args.rounds,
        "results": results,
    }
    if args.save:
        print("wrote", write_json("cpu", record).name)


if __name__ == "__main__":
    main()
