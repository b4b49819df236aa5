"""Everything that needs a GPU, in one command: ``make gpu-check``.

Builds the extension for this machine's GPU, runs the tests marked `gpu`, a short pass of
compute-sanitizer and the benchmark with whatever peers are installed, and writes one JSON. Needs
torch with CUDA, nvcc, cmake, ninja, pybind11 and pytest; no network, no virtual environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import write_json

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = "tests/kernels/test_gpu.py::test_small_cases_of_every_kernel"
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]


def stage(name: str, command: list[str], timeout: float, **environment: str) -> dict[str, Any]:
    """Run one stage; its outcome, seconds and the last lines of its output."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = -1, f"{error.stdout or ''}\nstopped after {timeout:.0f} s"
    tail = output.splitlines()[-25:]
    seconds = time.monotonic() - begin
    print("\n".join(tail), f"\n== {name}: exit {code}, {seconds:.0f} s", flush=True)
    return {"ok": code == 0, "seconds": round(seconds, 1), "tail": tail}


def build() -> dict[str, Any]:
    """The extension, compiled for the GPU that is here, in place."""
    return stage(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        180,
        PAPO_CUDA="on",
        CMAKE_ARGS=f"{os.environ.get('CMAKE_ARGS', '')} -DCMAKE_CUDA_ARCHITECTURES=native".strip(),
    )


def sanitize() -> dict[str, Any]:
    """memcheck and racecheck over every kernel on small shapes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ok": True, "skipped": "compute-sanitizer is not on PATH"}
    results = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all"]
        results[check] = stage(check, [*command, sys.executable, *PYTEST, SANITIZED], 90)
    return {"ok": all(r["ok"] for r in results.values()), **results}


def benchmark(rounds: int) -> dict[str, Any]:
    """The benchmark, in this process now that the extension exists."""
    from benchmarks import bench_gpu

    begin = time.monotonic()
    record = bench_gpu.run(rounds)
    return {"ok": True, "seconds": round(time.monotonic() - begin, 1), **record}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=["tests", "sanitizer", "benchmark"]
    )
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device; torch sees none", file=sys.stderr)
        return 1
    record: dict[str, Any] = {"build": build()}
    if not record["build"]["ok"]:
        write_json("gpu-check", record)
        return 1
    if "tests" not in args.skip:
        tests = [sys.executable, *PYTEST, "tests/kernels", "-m", "gpu"]
        record["tests"] = stage("tests", tests, 200)
    if "sanitizer" not in args.skip:
        record["sanitizer"] = sanitize()
    if "benchmark" not in args.skip:
        record["benchmark"] = benchmark(args.rounds)
    print("wrote", write_json("gpu-check", record))
    return 0 if all(part["ok"] for part in record.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
