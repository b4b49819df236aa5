"""What the calls run, in which order and within which limits.

What tells most comes first. A group's limit is kept for it whatever the groups before it do; the
limits of a call add up to its budget.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import rehearsal, training
from benchmarks.gpu_check.counted import CASES as COUNTED
from benchmarks.gpu_check.facts import beside_nvcc
from benchmarks.gpu_check.runner import Stage, worker_command
from benchmarks.gpu_check.target import FAMILIES

BUDGETS = {0: 570.0, 1: 270.0, 2: 360.0, 3: 280.0}  # seconds; call 0: chosen stages of all
PATIENCE = 8  # of a rehearsal, in which nothing is measured, as a factor on limits and budgets
SMOKE_TESTS = "tests/kernels/test_gpu.py"
TRITON_TESTS = "*/test_triton_*.py"
# The kernels without bulk copies: racecheck reports hazards for those, in many of its versions,
# where there are none.
RACECHECKED = ("streamed", "triton")
HELP_SECONDS = 5
COUNTERS_SECONDS = {"resident-loss": 14, "resident-stats": 14, "triton-stats": 12}
# A sanitizer knows allocations: within a block of torch's cache it would see no error.
UNCACHED = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
# Inductor compiles a program for every set of vector instructions that the CPU has, some 10 s each
# beside other tests, before it compiles the one kernel on the CPU that a graph of ours has: the
# numbers of a call.
UNPROBED = (("TORCHINDUCTOR_VEC_ISA_OK", "0"),)


def probe() -> Stage:
    return Stage("probe", 14, ("probe",))


def first_call(capability: str, work: Path) -> list[Stage]:
    """Figures: build, smoke, timings, sweeps, counters, the fused head, the device's own tests."""
    build = Stage("build", 55, ("build", capability, "normal", "smoke"), vital=True)
    warm = Stage("warm-triton", 50, ("warm",), together=True, required=False)
    smoke = [
        Stage(f"smoke-{f}", 20, ("smoke", f), environment=FAMILIES[f].variables, together=i > 0)
        for i, f in enumerate(FAMILIES)
    ]
    timing = [
        Stage(f"timing-{f}", seconds, ("timing", f), environment=FAMILIES[f].variables)
        for f, seconds in (("resident", 10), ("triton", 12), ("streamed", 8))
    ]
    sweeps = [
        Stage(f"sweep-{name}", seconds, ("sweep", name), elastic=True, restarts=True)
        for name, seconds in (("cuda", 30), ("triton", 20))
    ]
    counters = [
        Stage(f"ncu-{case}", COUNTERS_SECONDS.get(case, 11), ("counters", case), elastic=True)
        for case in COUNTED
    ]
    linear = Stage("linear", 18, ("linear",))
    tests = _tests("pytest-smoke", 32, work, (SMOKE_TESTS,))
    return [build, warm, *smoke, *timing, *sweeps, *counters, linear, tests]


def second_call(
    capability: str, work: Path, wheels: Path | None, stages: dict[str, Any]
) -> list[Stage]:
    """Correctness at length: sanitizers, all GPU tests; then the peers. `stages`: the outcomes of
    the first call."""
    build = Stage("build-again", 40, ("build", capability, "normal"), vital=True)
    kernels = ("tests/kernels", "-m", "gpu", "--ignore", SMOKE_TESTS)
    tests = [
        _tests(f"tests-{backend}", seconds, work, (*kernels, "--backends", backend, *own))
        for backend, seconds, own in (
            ("cuda", 112, ("--ignore-glob", TRITON_TESTS)),
            ("triton", 112, ()),
        )
    ]
    # Triton's wait for their compiler most of the time.
    tests[1] = tests[1]._replace(together=True)
    arguments = ("comparison", healthy(stages), *([str(wheels.resolve())] if wheels else []))
    peers = Stage("peers", 120, arguments)
    return [build, *_sanitizers(), *tests, peers]


def third_call(capability: str) -> list[Stage]:
    """The trainer, where what it imports and the embedded model are installed."""
    build = Stage("build-for-training", 40, ("build", capability, "normal"), vital=True)
    jobs = []
    for job, seconds in (("smollm2", 125), ("qwen2", 95)):
        absent = training.why_absent(job)
        work = ("training", job)
        name = f"training-{job}"
        jobs.append(Stage(name, seconds, work, elastic=True, required=not absent, absent=absent))
    return [build, *jobs]


def of_call(
    call: int, capability: str, work: Path, wheels: Path | None, outcomes: dict[str, Any]
) -> list[Stage]:
    """The stages of one call, or of all of them for call 0. `outcomes`: of earlier calls."""
    calls = (
        lambda: first_call(capability, work),
        lambda: second_call(capability, work, wheels, outcomes),
        lambda: third_call(capability),
    )
    return [stage for i, make in enumerate(calls, 1) if call in (0, i) for stage in make()]


def only(planned: Sequence[Stage], chosen: Sequence[str]) -> list[Stage]:
    """The stages that are chosen by name, or by what their names begin with ("sweep", "ncu").

    Raises:
        ValueError: a choice is none of them.
    """

    def matches(stage: Stage, name: str) -> bool:
        return stage.name == name or stage.name.startswith(f"{name}-")

    for name in chosen:
        if not any(matches(stage, name) for stage in planned):
            known = ", ".join(stage.name for stage in planned)
            raise ValueError(f"--stages: expected some of {known}; got {name!r}")
    return [stage for stage in planned if any(matches(stage, name) for name in chosen)]


def healthy(stages: dict[str, Any]) -> str:
    """Our backends but those whose kernels failed the smoke stage: an error there would take the
    peers with it."""
    broken = {
        FAMILIES[family].backend
        for family in ("resident", "triton")
        if not stages.get(f"smoke-{family}", {"ok": True})["ok"]
    }
    return ",".join(backend for backend in ("cuda", "triton") if backend not in broken)


def _sanitizers() -> list[Stage]:
    """The smoke cases on the measured build, each family under each check; at the same time, as no
    time is taken."""
    tool = beside_nvcc("compute-sanitizer")
    if tool is None:
        reason = "compute-sanitizer is neither on PATH nor beside nvcc"
        return [Stage("sanitizer", 0, absent=reason, required=False)]
    # Renamed in 2023.3:
    only = "--kernel-name" if "--kernel-name" in _help(tool) else "--kernel-regex"
    found = []
    for check, seconds, families in (
        ("memcheck", 42, tuple(FAMILIES)),
        ("racecheck", 32, RACECHECKED),
    ):
        for i, family in enumerate(families):
            kernels = () if FAMILIES[family].backend == "triton" else (only, "kns=papo")
            command = (tool, "--tool", check, "--error-exitcode", "9", "--target-processes", "all")
            program = worker_command(("smoke", family, "sanitized"))
            variables = (*UNCACHED, *FAMILIES[family].variables)
            found.append(
                Stage(
                    f"{check}-{family}",
                    seconds,
                    command=(*command, *kernels, *program),
                    environment=variables,
                    together=i > 0,
                    required=False,
                )
            )
    return found


def _help(tool: str) -> str:
    """What a tool says of its options, whatever its exit status is; empty where it hangs."""
    try:
        done = subprocess.run(
            [tool, "--help"], stdin=subprocess.DEVNULL, capture_output=True, timeout=HELP_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def _tests(name: str, seconds: float, work: Path, arguments: Sequence[str]) -> Stage:
    """pytest, in several processes if there is xdist; a test that hangs shows where it does."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.failures"]
    options += ["-o", "faulthandler_timeout=60"]
    if rehearsal.active():
        options += rehearsal.pytest_arguments(work)
    else:
        if importlib.util.find_spec("pytest_timeout"):
            options += ["--timeout", "75", "--timeout-method", "thread"]
        if importlib.util.find_spec("xdist"):
            options += ["-n", str(min(8, os.cpu_count() or 1))]
        options += arguments
    command = (sys.executable, "-m", "pytest", *options)
    return Stage(name, seconds, command=command, environment=UNPROBED, elastic=True)


def rehearsed(stages: Sequence[Stage]) -> list[Stage]:
    """The same with the limit of the stage that hangs cut short, and the others' far from what a
    busy machine needs."""
    return [
        s._replace(limit=rehearsal.HANG_LIMIT if s.name == rehearsal.HANGS else s.limit * PATIENCE)
        for s in stages
    ]
