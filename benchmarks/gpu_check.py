"""Everything that needs a GPU, in one command: ``make gpu-check``.

Builds the extension for this machine's GPU, then runs tests/kernels/test_gpu.py (smoke), the
benchmark with whatever peers are installed, the other tests marked `gpu` and compute-sanitizer:
what tells most comes first, each stage in a process of its own, all of them within BUDGET seconds.
A stage that fails or hangs is recorded and the next one goes on. After every stage
``results/gpu-check-<date>.json`` is written anew; ``build/gpu-check/`` has the full outputs.

Needs torch with CUDA, nvcc, cmake, ninja, pybind11 and pytest, and uses pytest-xdist and
pytest-timeout where they are installed; no network, no virtual environment.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment, write_json

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu-check"

# Seconds. The whole command is to end within 480; the difference is for starting and stopping.
BUDGET = 470
BUILD, SMOKE, BENCHMARK, TESTS, SANITIZER = 150, 75, 180, 150, 60  # at most, for a stage
LEAST = 5  # with less than this left a stage is not begun
STOPPED = "stopped at its limit"

SMOKE_TESTS = "tests/kernels/test_gpu.py"
SANITIZED_TEST = f"{SMOKE_TESTS}::test_small_cases_of_every_kernel"
ARCHITECTURES = {(8, 0): "80-real", (9, 0): "90a-real", (10, 0): "100-real"}


def run_limited(command: list[str], log: Path, limit: float, more: dict[str, str]) -> int | str:
    """Run a command with its output in `log`; its exit status, or STOPPED."""
    with log.open("w") as output:
        # A group of its own, so that what it has started is stopped as well: a process that a
        # sanitizer has started would stay on the GPU.
        streams: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **more}, start_new_session=True, **streams
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return STOPPED
        finally:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(LEAST)


class Check:
    """The stages' outcomes, saved after each of them, and the time that is left."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.deadline = time.monotonic() + BUDGET
        self.record: dict[str, Any] = {"environment": environment()}

    def add(self, name: str, outcome: dict[str, Any]) -> None:
        self.record[name] = outcome
        path = write_json("gpu-check", self.record)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, self.out)
            shutil.copytree(LOGS, self.out / LOGS.name, dirs_exist_ok=True)

    def skip(self, name: str, reason: str, ok: bool) -> None:
        print(f"== {name}: skipped: {reason}", flush=True)
        self.add(name, {"ok": ok, "skipped": reason})

    def run(
        self, name: str, command: list[str], cap: float, required: bool = True, **variables: str
    ) -> None:
        """One stage: whether it passed, its seconds and the last lines of its output."""
        limit = min(cap, self.deadline - time.monotonic())
        if limit < LEAST:
            return self.skip(name, "no time is left for it", ok=not required)
        print(f"== {name}: {' '.join(command)}", flush=True)
        begin, log = time.monotonic(), LOGS / f"{name}.log"
        code = run_limited(command, log, limit, variables)
        seconds = round(time.monotonic() - begin, 1)
        tail = log.read_text(errors="replace").splitlines()[-25:]
        print("\n".join(tail), f"\n== {name}: exit: {code}, {seconds:.0f} s", flush=True)
        self.add(name, {"ok": code == 0, "exit": code, "seconds": seconds, "tail": tail})

    def summary(self) -> int:
        """The command's exit status."""
        outcomes = [(k, v) for k, v in self.record.items() if k != "environment"]
        for name, part in outcomes:
            note = f"(skipped: {part['skipped']})" if "skipped" in part else ""
            print(f"{name:<16}", "ok" if part["ok"] else "FAILED", note)
        return 0 if all(part["ok"] for _, part in outcomes) else 1

    def build(self) -> None:
        """The extension in place, for this GPU alone: what it reports, as CMake's `native` is not
        in every CMake and knows nothing of the instructions that only 90a has."""
        major, minor = torch.cuda.get_device_capability()
        architecture = ARCHITECTURES.get((major, minor), f"{major}{minor}-real")
        cmake = f"{os.environ.get('CMAKE_ARGS', '')} -DCMAKE_CUDA_ARCHITECTURES={architecture}"
        more = {"architecture": architecture}
        more["setuptools"] = self.record["environment"].get("setuptools", "absent")
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        self.run("build", command, BUILD, PAPO_CUDA="on", CMAKE_ARGS=cmake.strip())
        self.add("build", {**self.record["build"], **more})

    def benchmark(self, rounds: int) -> None:
        """What it has measured is in the record even where it was stopped."""
        path = LOGS / "benchmark.json"
        command = [sys.executable, "-m", "benchmarks.bench_gpu", "--rounds", f"{rounds}"]
        self.run("benchmark", [*command, "--json", f"{path}"], BENCHMARK)
        if path.exists():
            self.add("benchmark", {**self.record["benchmark"], **json.loads(path.read_text())})

    def sanitize(self) -> None:
        """compute-sanitizer over every kernel on small shapes; what is left of the time decides how
        many of its tools run."""
        tool = find_sanitizer()
        if tool is None:
            return self.skip("sanitizer", "it is neither on PATH nor beside nvcc", ok=True)
        options = subprocess.run([tool, "--help"], stdout=subprocess.PIPE).stdout
        # Renamed in 2023.3:
        only = "--kernel-name" if b"--kernel-name" in options else "--kernel-regex"
        ours = [only, "kns=papo"]
        # Many versions of racecheck report hazards for bulk copies that complete on an mbarrier
        # where there are none; the other kernels have no such copies.
        no_bulk_copies = [f"{only}-exclude", "kns=resident_kernel"]
        # memcheck knows allocations: within a block of torch's cache it would see no error.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        common = ["--error-exitcode", "9", "--target-processes", "all"]
        for check, backend, kernels in (
            ("memcheck", "cuda", ours),
            ("racecheck", "cuda", no_bulk_copies),
            ("memcheck", "triton", []),
            ("racecheck", "triton", []),
            ("synccheck", "cuda", ours),
        ):
            command = [tool, "--tool", check, *common, *kernels, *pytest_command(parallel=False)]
            command += [SANITIZED_TEST, "-k", backend]
            self.run(f"{check}-{backend}", command, SANITIZER, required=False, **uncached)


def find_sanitizer() -> str | None:
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    beside = str(Path(nvcc).resolve().parent) if nvcc else ""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


def pytest_command(parallel: bool = True) -> list[str]:
    """pytest, in several processes if there is xdist; a test that hangs shows where it does."""
    options = ["-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "90", "--timeout-method", "thread"]
    if parallel and importlib.util.find_spec("xdist"):
        options += ["-n", "8"]
    return [sys.executable, "-m", "pytest", *options]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="copy the JSON and the logs there as well")
    skippable = ["smoke", "benchmark", "tests", "sanitizer"]
    parser.add_argument("--skip", nargs="*", default=[], choices=skippable)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device; torch sees none", file=sys.stderr)
        return 1
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    check = Check(args.out)
    check.build()
    rest = ["tests/kernels", "-m", "gpu", "--ignore", SMOKE_TESTS]
    if "smoke" not in args.skip:
        check.run("smoke", [*pytest_command(), SMOKE_TESTS], SMOKE)
    if "benchmark" not in args.skip:
        check.benchmark(args.rounds)
    if "tests" not in args.skip:
        check.run("tests", [*pytest_command(), *rest], TESTS)
    if "sanitizer" not in args.skip:
        check.sanitize()
    return check.summary()


if __name__ == "__main__":
    sys.exit(main())
