"""What a Triton call costs the host: ``python -m benchmarks.bench_triton_host [COMMIT]``.

Process CPU time of the public functions up to the launch, which a stand-in for Triton's driver
takes: no GPU is needed. CPU tensors stand for a GPU's, so allocation is that of CPU memory. Two
versions, this tree and COMMIT, are timed in turns, a process each, and compared.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
ROWS, COLUMNS = 1024, 4096
BATCH, BATCHES = 200, 40


class Driver:
    """What Triton asks its driver for, on a machine without a GPU: a kernel is compiled and not
    started."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 232_448},
        )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None


def calls() -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    from papo_kernels import PolarityWeighting, PolicyLossParams, policy_loss, token_stats

    logits = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    targets, values = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS)
    params, weighting = PolicyLossParams(entropy_coef=0.01), PolarityWeighting(0.5, 0.5)

    def stats(of: torch.Tensor = logits) -> None:
        token_stats(of, targets, backend="triton")

    def loss(of: torch.Tensor = logits, **more: Any) -> None:
        policy_loss(of, targets, values, values, old_logp=values, backend="triton", **more)

    return {
        "token_stats": stats,
        "token_stats, differentiable": lambda: stats(leaf),
        "policy_loss": loss,
        "policy_loss, weighted": lambda: loss(params=params, weighting=weighting),
        "policy_loss, differentiable": lambda: loss(leaf),
    }


def measure() -> dict[str, float]:
    """Microseconds a call, median over batches, of the `papo_kernels` that is imported."""
    from triton.runtime import driver

    from papo_kernels import backend, loss_ops, ops

    driver.set_active(Driver())
    backend._CANNOT["triton"] = lambda device, dtype: None
    # Targets on a GPU are not looked at.
    ops.check_target_values = loss_ops.check_target_values = lambda *_: None
    torch.set_num_threads(1)
    cases = calls()
    timed: dict[str, list[float]] = {name: [] for name in cases}
    gc.disable()
    for i in range(BATCHES + 2):
        for name, call in cases.items():
            call()
            start = time.process_time()
            for _ in range(BATCH):
                call()
            if i >= 2:
                timed[name].append((time.process_time() - start) / BATCH * 1e6)
    return {name: statistics.median(times) for name, times in timed.items()}


def run(tree: Path) -> dict[str, float]:
    """`measure` in a process of its own, of the package in `tree`."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    done = subprocess.run(
        command, env=environment, cwd=tree, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def exported(commit: str, to: Path) -> Path:
    """The package as `commit` has it."""
    command = ["git", "-C", str(ROOT), "archive", commit, "papo_kernels"]
    archive = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(to, filter="data")
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", nargs="?", default="HEAD~1", help="to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure()))
        return
    with tempfile.TemporaryDirectory() as folder:
        trees = {"old": exported(args.commit, Path(folder)), "new": ROOT}
        results: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
        for _ in range(args.rounds):
            for name, tree in trees.items():
                results[name].append(run(tree))
    print(f"{'us a call':30s} {args.commit[:12]:>12s} {'this tree':>12s} {'old / new':>10s}")
    for call in results["new"][0]:
        old, new = (statistics.median(r[call] for r in results[name]) for name in trees)
        print(f"{call:30s} {old:12.1f} {new:12.1f} {old / new:10.2f}")


if __name__ == "__main__":
    main()
