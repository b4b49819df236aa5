"""GPU kernels beside their peers: ``python -m benchmarks.bench_gpu``; README.md has the protocol.

Every figure carries GB/s over the bytes the operation must move, and that as a share of the copy
rate measured in the same run. `make gpu-check` runs this last.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import linear_peers, peers
from benchmarks.gpu_workload import GPU, LinearWorkload, Workload, able_backends, rates
from benchmarks.harness import (
    Case,
    GpuStopwatch,
    Stopwatch,
    environment,
    measure,
    one_line,
    write_json,
)
from benchmarks.shapes import (
    GPU_COMPILED,
    GPU_LINEAR_SHAPES,
    GPU_MAIN,
    GPU_SHAPES,
    GPU_TIMED,
    LinearShape,
    Shape,
)

# Reads and writes of the logits that each kind of case needs.
PASSES = {"fwd": 1, "fwd+bwd": 3, "loss+dlogits": 2}


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


class Bench:
    """The comparison on one device.

    Args:
        device: where the tensors live.
        backends: ours, that are compared.
        compiled: the shapes at which torch.compile is measured too.
        rounds: of the shapes of logits; a quarter of them from hidden states.
    """

    def __init__(
        self,
        device: torch.device,
        stopwatch: Stopwatch,
        backends: list[str],
        compiled: tuple[Shape, ...],
        rounds: int,
    ) -> None:
        self.device, self.stopwatch, self.backends = device, stopwatch, backends
        self.compiled, self.rounds = compiled, rounds

    def logits(self, shape: Shape) -> dict[str, Any]:
        """One shape: every figure in ms, GB/s, share of the copy rate and MiB."""
        work = Workload(shape, self.device)
        cases = [Case("copy", work.restore)]
        for backend in self.backends:
            cases += own_cases(work, backend)
        compiled = shape in self.compiled
        cases += peers.logits_cases(work.logits, work.targets, work.old_logp, compiled)
        measured = measure(cases, self.rounds, self.stopwatch)
        torch.compiler.reset()
        figures: dict[str, Any] = {}
        for case in measured:
            passes = 2 if case.name == "copy" else passes_of(case.name)
            rate = rates(case.ms, passes * shape.bytes, measured[0].ms, 2 * shape.bytes)
            figures[case.name] = {**case.spread, **rate, "peak MiB": case.peak_mib}
        return {"figures": figures, "failures": _failures(cases)}

    def linear(self, shape: LinearShape) -> dict[str, Any]:
        """Loss and all gradients from hidden states beside the three bare products."""
        work = LinearWorkload(shape, self.device)
        cases = [
            Case("three bare products", work.products),
            Case("papo policy_loss", work.loss),
        ]
        compiled = shape == GPU_LINEAR_SHAPES[0]
        cases += linear_peers.linear_cases(work.hidden, work.weight, work.targets, compiled)
        measured = measure(cases, max(5, self.rounds // 4), self.stopwatch)
        torch.compiler.reset()
        figures = {
            case.name: {
                **case.spread,
                "TFLOP/s": 3 * shape.flops / case.ms / 1e9,
                "of bare products": case.ms / measured[0].ms,
                "peak MiB": case.peak_mib,
            }
            for case in measured
        }
        return {"figures": figures, "failures": _failures(cases)}

    def attempt(self, shape: Shape | LinearShape) -> dict[str, Any]:
        """One shape; an error that is no single case's, such as too little memory, is its
        result."""
        try:
            return self.logits(shape) if isinstance(shape, Shape) else self.linear(shape)
        except Exception as error:
            return {"figures": {}, "failures": {"the shape": one_line(error)}}

    def host_overhead(self, calls: int = 2000) -> dict[str, float]:
        """Microseconds of host time that a call of `token_stats` on one small row takes, and an
        empty torch operation beside it; the device is never the limit."""
        work = Workload(Shape(1, 128, torch.bfloat16), self.device)
        flag = torch.zeros((), device=self.device)
        runs: dict[str, Callable[[], Any]] = {"torch add_": lambda: flag.add_(1)}
        runs |= {f"papo {b} stats fwd": lambda b=b: work.stats(b) for b in self.backends}
        return {name: _microseconds(run, calls) for name, run in runs.items()}


def _failures(cases: list[Case]) -> dict[str, str]:
    return {case.name: case.failure for case in cases if case.failure}


def _microseconds(run: Callable[[], Tensor], calls: int) -> float:
    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(calls // 20 + 1):
        run()
    wait()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    seconds = time.perf_counter() - begin
    wait()
    return seconds / calls * 1e6


def print_table(shape: str, result: dict[str, Any]) -> None:
    print(f"\n{shape}")
    for name, figure in result["figures"].items():
        row = "  ".join(f"{value:10.3f} {unit}" for unit, value in figure.items())
        print(f"  {name:<52}{row}", flush=True)
    for name, reason in result["failures"].items():
        print(f"  {name:<52}not measured: {reason}")


def able() -> list[str]:
    """Our backends that this machine can run; the reasons of the others are printed."""
    reasons = able_backends(torch.bfloat16)
    for reason in filter(None, reasons.values()):
        print(reason)
    return [name for name, reason in reasons.items() if not reason]


def ordered() -> list[Shape | LinearShape]:
    """The main shapes first, so that a run that is stopped has them."""
    first, *more = GPU_TIMED
    rest = [shape for shape in GPU_SHAPES if shape not in GPU_TIMED]
    return [first, GPU_LINEAR_SHAPES[0], *more, *GPU_LINEAR_SHAPES[1:], *rest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="a substring of the shapes to run")
    parser.add_argument("--wheels", type=Path, help="a folder of the peers' wheels")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu needs a CUDA device; benchmarks.bench_cpu runs on the CPU")
    if args.wheels is not None:
        peers.use_wheels(args.wheels, Path(tempfile.mkdtemp()))
    bench = Bench(GPU, GpuStopwatch(), able(), GPU_COMPILED, args.rounds)
    record: dict[str, Any] = {"environment": environment(), "rounds": args.rounds, "results": {}}
    for shape in ordered():
        if args.only in shape.name:
            record["results"][shape.name] = bench.attempt(shape)
            print_table(shape.name, record["results"][shape.name])
            torch.cuda.empty_cache()
        if shape == GPU_MAIN:
            record["host overhead, us"] = bench.host_overhead()
            print("\nhost overhead, us:", record["host overhead, us"])
        record["unavailable peers"] = peers.unavailable
        saved = write_json("gpu", record)
    for module, reason in peers.unavailable.items():
        print(f"not measured: {module}: {reason}")
    print("wrote", saved)


if __name__ == "__main__":
    main()
