"""What a Triton call costs the host: ``python -m benchmarks.bench_triton_host [COMMIT]``.

Process CPU time of the public functions up to the launch, which a stand-in for Triton's driver
takes: no GPU is needed. CPU tensors stand for a GPU's, so allocation is that of CPU memory. Two
versions, this tree and COMMIT, take turns, a batch of calls each, in a process of their own.
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

from benchmarks.harness import environment, write_json

ROOT = Path(__file__).parents[1]
ROWS, COLUMNS = 1024, 4096
BATCH = 100  # calls


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


def serve() -> None:
    """For every line that comes, one with the microseconds a call, of the `papo_kernels` that is
    imported."""
    from triton.runtime import driver

    from papo_kernels.backends import choice as backend
    from papo_kernels.ops import policy_loss as loss_ops
    from papo_kernels.ops import token_stats as ops

    driver.set_active(Driver())
    backend._CANNOT["triton"] = lambda device, dtype: None
    # Targets on a GPU are not looked at.
    ops.check_target_values = loss_ops.check_target_values = lambda *_: None
    torch.set_num_threads(1)
    gc.disable()
    cases = calls()
    for _ in sys.stdin:
        us = {}
        for name, call in cases.items():
            call()
            start = time.process_time()
            for _ in range(BATCH):
                call()
            us[name] = (time.process_time() - start) / BATCH * 1e6
        print(json.dumps(us), flush=True)


class Version:
    """A process that times the package in `tree`, a batch of every call when it is asked."""

    def __init__(self, tree: Path) -> None:
        paths = os.pathsep.join((str(tree), str(ROOT), os.environ.get("PYTHONPATH", "")))
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ask()  # compiles

    def ask(self) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        us: dict[str, float] = json.loads(self._process.stdout.readline())
        return us

    def close(self) -> None:
        self._process.communicate()


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
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--save", action="store_true", help="write results/triton-host-*.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    with tempfile.TemporaryDirectory() as folder:
        trees = {args.commit: exported(args.commit, Path(folder)), "this tree": ROOT}
        versions = {name: Version(tree) for name, tree in trees.items()}
        rounds = [{name: v.ask() for name, v in versions.items()} for _ in range(args.rounds)]
        for version in versions.values():
            version.close()
    us = {
        call: {name: statistics.median(r[name][call] for r in rounds) for name in trees}
        for call in rounds[0]["this tree"]
    }
    print(f"{'us a call':30s}" + "".join(f"{name[:12]:>14s}" for name in trees) + "     ratio")
    for call, (old, new) in ((call, us[call].values()) for call in us):
        print(f"{call:30s}{old:14.1f}{new:14.1f}{old / new:10.2f}")
    if args.save:
        record = {
            "environment": environment(),
            "clock": "process CPU time, one thread, median of interleaved batches",
            "rounds": args.rounds,
            "us": us,
        }
        print("wrote", write_json("triton-host", record).name)


if __name__ == "__main__":
    main()
