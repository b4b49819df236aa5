"""GPU kernels beside their peers: ``python -m benchmarks.bench_gpu``; README.md has the protocol.

Every figure carries GB/s over the bytes the operation must move, and that as a share of the copy
rate measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Case, environment, produced, time_on_gpu, write_json
from benchmarks.shapes import GPU_LINEAR_SHAPES, GPU_MAIN, GPU_SHAPES, LinearShape, Shape
from papo_kernels import PolarityWeighting, linear_policy_loss, policy_loss, token_stats
from papo_kernels import backend as backends

# Reads and writes of the logits that each kind of case needs.
PASSES = {"fwd": 1, "fwd+bwd": 3, "loss+dlogits": 2}


class Workload:
    """Inputs of one shape; ``scratch`` is a copy of the logits that in-place cases may spoil."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.logits = torch.empty(shape.rows, shape.vocab, dtype=shape.dtype, device="cuda")
        self.logits.normal_(0, 2, generator=generator)
        self.scratch = torch.empty_like(self.logits)
        rows = (shape.rows,)
        self.targets = torch.randint(shape.vocab, rows, generator=generator, device="cuda")
        self.advantages = torch.randn(rows, generator=generator, device="cuda")
        self.token_weight = torch.full(rows, 1 / shape.rows, device="cuda")
        self.old_logp = token_stats(self.logits, self.targets).logp
        one = torch.ones((), device="cuda")
        self.weighting = PolarityWeighting(0.5, one * 0.3, sigma=one, scale=one)

    def restore(self) -> None:
        self.scratch.copy_(self.logits)

    def stats(self, backend: str) -> Any:
        with torch.no_grad():
            return token_stats(self.logits, self.targets, backend=backend)

    def stats_backward(self, backend: str) -> Tensor | None:
        leaf = self.logits.detach().requires_grad_()
        out = token_stats(leaf, self.targets, backend=backend)
        (out.logp.sum() + out.entropy.sum() + out.unit_polarity.sum()).backward()
        return leaf.grad

    def loss(self, backend: str) -> Tensor:
        out = policy_loss(
            produced(self.scratch),
            self.targets,
            self.advantages,
            self.token_weight,
            old_logp=self.old_logp,
            weighting=self.weighting,
            inplace=True,
            backend=backend,
        )
        out.loss.backward()
        return self.scratch


def able_backends(dtype: torch.dtype) -> list[str]:
    """The GPU backends that this machine can run."""
    able = []
    for name in ("cuda", "triton"):
        try:
            backends.choose(name, torch.device("cuda", 0), dtype)
            able.append(name)
        except ValueError as error:
            print(error)
    return able


def own_cases(work: Workload, backend: str) -> list[Case]:
    return [
        Case(f"papo {backend} stats fwd", lambda: work.stats(backend)),
        Case(f"papo {backend} stats fwd+bwd", lambda: work.stats_backward(backend)),
        Case(f"papo {backend} loss+dlogits", lambda: work.loss(backend), work.restore),
    ]


def passes_of(name: str) -> int:
    """How often a case must touch the logits, from the end of its name."""
    if "with dx" in name or "grpo" in name:
        return PASSES["loss+dlogits"]
    return next((n for kind, n in reversed(PASSES.items()) if kind in name), 1)


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """One shape: every figure in ms, GB/s, share of the copy rate and MiB."""
    work = Workload(shape)
    cases = [Case("copy", work.restore)]
    for backend in able_backends(shape.dtype):
        cases += own_cases(work, backend)
    cases += peers.logits_cases(work.logits, work.targets)
    measured = time_on_gpu(cases, rounds)
    torch.compiler.reset()
    copy_rate = 2 * shape.bytes / measured[0].ms
    figures: dict[str, Any] = {}
    for case in measured:
        rate = (2 if case.name == "copy" else passes_of(case.name)) * shape.bytes / case.ms
        figures[case.name] = {
            "ms": case.ms,
            "GB/s": rate / 1e6,
            "of copy rate": rate / copy_rate,
            "peak MiB": case.peak_mib,
        }
    failures = {case.name: case.failure for case in cases if case.failure}
    return {"figures": figures, "failures": failures}


def measure_linear(shape: LinearShape, rounds: int) -> dict[str, Any]:
    """Loss and all gradients from hidden states beside the three bare products."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        out = torch.empty(size, dtype=shape.dtype, device="cuda")
        return out.normal_(0, std, generator=generator)

    hidden = normal(shape.rows, shape.hidden)
    weight = normal(shape.vocab, shape.hidden, std=shape.hidden**-0.5)
    targets = torch.randint(shape.vocab, (shape.rows,), generator=generator, device="cuda")
    advantages = torch.randn(shape.rows, generator=generator, device="cuda")
    token_weight = torch.full((shape.rows,), 1 / shape.rows, device="cuda")

    def products() -> Any:
        logits = hidden @ weight.T
        return logits @ weight, logits.T @ hidden

    def ours() -> Any:
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        linear_policy_loss(h, w, targets, advantages, token_weight).loss.backward()
        return h.grad, w.grad

    cases = [Case("three bare products", products), Case("papo linear_policy_loss", ours)]
    cases += peers.linear_cases(hidden, weight, targets)
    measured = time_on_gpu(cases, rounds)
    bare = measured[0].ms
    figures = {
        case.name: {
            "ms": case.ms,
            "TFLOP/s": 3 * shape.flops / case.ms / 1e9,
            "of bare products": case.ms / bare,
            "peak MiB": case.peak_mib,
        }
        for case in measured
    }
    return {
        "figures": figures,
        "failures": {case.name: case.failure for case in cases if case.failure},
    }


def host_overhead(calls: int = 2000) -> dict[str, float]:
    """Microseconds of host time that a call of `token_stats` on one small row takes, and an empty
    torch operation beside it; the device is never the limit."""
    work = Workload(Shape(1, 128, torch.bfloat16))
    flag = torch.zeros((), device="cuda")
    figures = {}
    runs = {f"papo {b} stats fwd": lambda b=b: work.stats(b) for b in able_backends(torch.bfloat16)}
    for name, run in {"torch add_": lambda: flag.add_(1), **runs}.items():
        for _ in range(100):
            run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        figures[name] = (time.perf_counter() - begin) / calls * 1e6
        torch.cuda.synchronize()
    return figures


def print_table(shape: str, result: dict[str, Any]) -> None:
    print(f"\n{shape}")
    for name, figure in result["figures"].items():
        row = "  ".join(f"{value:10.3f} {unit}" for unit, value in figure.items())
        print(f"  {name:<52}{row}", flush=True)
    for name, reason in result["failures"].items():
        print(f"  {name:<52}not measured: {reason}")


def attempt(shape: Shape | LinearShape, rounds: int) -> dict[str, Any]:
    """One shape; an error that is no single case's, such as too little memory, is its result."""
    try:
        if isinstance(shape, Shape):
            return measure(shape, rounds)
        return measure_linear(shape, max(5, rounds // 4))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"figures": {}, "failures": {"the shape": reason}}


def run(rounds: int, only: str, path: Path | None) -> Path:
    """Every shape whose name contains `only`, the main ones first, printed and saved as it comes,
    so that a run that is stopped leaves what it has measured."""
    record: dict[str, Any] = {"environment": environment(), "rounds": rounds, "results": {}}
    saved = write_json("gpu", record, path)
    first, *more = GPU_SHAPES
    shapes: list[Shape | LinearShape] = [first, GPU_LINEAR_SHAPES[0]]
    for shape in (*shapes, *more, *GPU_LINEAR_SHAPES[1:]):
        if only not in shape.name:
            continue
        record["results"][shape.name] = attempt(shape, rounds)
        record["unavailable peers"] = peers.unavailable
        write_json("gpu", record, path)
        print_table(shape.name, record["results"][shape.name])
        torch.cuda.empty_cache()
        if shape == GPU_MAIN:
            record["host overhead, us"] = host_overhead()
            print("\nhost overhead, us:", record["host overhead, us"])
            write_json("gpu", record, path)
    for module, reason in peers.unavailable.items():
        print(f"not measured: {module}: {reason}")
    return saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="a substring of the shapes to run")
    parser.add_argument("--json", type=Path, help="the result file, instead of one in results/")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu needs a CUDA device; benchmarks.bench_cpu runs on the CPU")
    print("wrote", run(args.rounds, args.only, args.json))


if __name__ == "__main__":
    main()
