"""Builds the extension with plain CMake: the one that is measured, and one for the smoke stage
whose waits trap after a number of tries and name the barrier.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_check.worker import work_folder
from benchmarks.harness import ROOT

EXTENSION = "papo_kernels._C"
ARCHITECTURES = {"8.0": "80-real", "9.0": "90a-real", "10.0": "100-real"}
# Tries of a wait: the longest take microseconds, and a try some 20 cycles or more.
SPIN_LIMIT = 2_000_000
VARIANTS = {"normal": (), "smoke": (f"-DPAPO_SPIN_LIMIT={SPIN_LIMIT}",)}


def target_folder(variant: str, work: Path) -> Path:
    """Where a variant's extension goes: the measured one into the package."""
    return ROOT / "papo_kernels" if variant == "normal" else work / variant


def configure_command(variant: str, architecture: str, work: Path) -> list[str]:
    """As setup.py does it, which a setuptools older than pyproject.toml's metadata cannot run."""
    found = importlib.util.find_spec("pybind11")
    pybind11 = [f"-Dpybind11_DIR={Path(found.origin).parent}/share/cmake/pybind11"] if found else []
    return [
        "cmake",
        *("-S", str(ROOT), "-B", str(work / f"build-{variant}"), "-G", "Ninja"),
        "-DPAPO_CUDA=on",
        f"-DCMAKE_CUDA_ARCHITECTURES={architecture}",
        "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DPYTHON_EXECUTABLE={sys.executable}",
        *pybind11,
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target_folder(variant, work)}",
        *VARIANTS[variant],
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]


def run(notes: Notes, capability: str, *variants: str) -> int:
    """Builds the variants at the same time, for the one architecture that the GPU has: CMake's
    `native` is not in every CMake and knows nothing of the instructions that only 90a has."""
    work = work_folder()
    architecture = ARCHITECTURES.get(capability, f"{capability.replace('.', '')}-real")
    jobs = max(1, (os.cpu_count() or 1) // len(variants))
    running = {}
    for variant in variants:
        target_folder(variant, work).mkdir(parents=True, exist_ok=True)
        build = ["cmake", "--build", str(work / f"build-{variant}"), "--parallel", str(jobs), "-v"]
        configure = configure_command(variant, architecture, work)
        script = f"{shlex.join(configure)} && {shlex.join(build)}"
        log = work / "logs" / f"build-{variant}.log"
        with log.open("w") as output:
            running[variant] = subprocess.Popen(
                ["sh", "-c", script], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )
    failed = 0
    for variant, process in running.items():
        code = process.wait()
        text = (work / "logs" / f"build-{variant}.log").read_text(errors="replace")
        result: dict[str, Any] = {"exit": code, "kernels": kernels(text)}
        notes.put(architecture=architecture, **{variant: result})
        print(f"{variant}: exit {code}, {summary(result['kernels'])}")
        if code:
            failed = 1
            print("\n".join(text.splitlines()[-15:]))
    return failed


def kernels(report: str) -> list[dict[str, Any]]:
    """What ptxas says of every kernel: registers, and bytes of stack and spills."""
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'"
        r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    return [
        {
            "kernel": symbol,
            "registers": int(registers),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
        }
        for symbol, _, stack, stores, loads, registers in pattern.findall(report)
    ]


def summary(found: list[dict[str, Any]]) -> str:
    if not found:
        return "ptxas reported no kernels"
    spilling = [kernel["kernel"] for kernel in found if kernel["spills"] or kernel["stack"]]
    most = max(kernel["registers"] for kernel in found)
    spills = f"spills in {', '.join(spilling)}" if spilling else "no spills"
    return f"{len(found)} kernels, at most {most} registers, {spills}"


def smoke_extension(work: Path) -> Path | None:
    """The smoke variant, where it has been built."""
    return next(iter(sorted(target_folder("smoke", work).glob("_C*.so"))), None)


def hold_back_extension() -> None:
    """From here on, importing the package does not load its extension."""
    sys.modules.setdefault(EXTENSION, None)  # type: ignore[arg-type]


def release_extension(smoke: bool) -> None:
    """Lets the package load its extension; `smoke`: the smoke build in the place of the measured
    one, where there is one. Before anything has loaded either."""
    if sys.modules.get(EXTENSION) is not None:
        raise RuntimeError(f"{EXTENSION} is already loaded")
    sys.modules.pop(EXTENSION, None)
    path = smoke_extension(work_folder()) if smoke else None
    if path is None:
        return
    spec = importlib.util.spec_from_file_location(EXTENSION, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[EXTENSION] = module


def loaded_variant() -> str:
    """Which build the package uses: "smoke" or "normal"."""
    path, module = smoke_extension(work_folder()), sys.modules.get(EXTENSION)
    return "smoke" if path and module and module.__file__ == str(path) else "normal"
