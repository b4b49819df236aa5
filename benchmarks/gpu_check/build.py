"""Builds the extension with plain CMake: the one that is measured, and one for the smoke stage
whose waits trap after a number of tries and name the barrier.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import facts
from benchmarks.gpu_check.files import Notes, read
from benchmarks.gpu_check.worker import work_folder
from benchmarks.harness import ROOT, save_json

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
    notes.put(architecture=architecture)
    missing = []
    for variant in variants:
        if found := built_before(variant, architecture, work):
            notes.put(**{variant: {**found, "built": "before"}})
            print(f"{variant}: built before, {summary(found['kernels'])}")
        else:
            missing.append(variant)
    failed = 0
    for variant in missing:
        _stamp(variant, work).unlink(missing_ok=True)
    for variant, process in _begun(missing, architecture, work).items():
        code = process.wait()
        text = _log(variant, work).read_text(errors="replace")
        result: dict[str, Any] = {"exit": code, "kernels": kernels(text)}
        notes.put(**{variant: result})
        print(f"{variant}: exit {code}, {summary(result['kernels'])}")
        if code:
            failed = 1
            print("\n".join(text.splitlines()[-15:]))
        else:
            stamp = _stamp(variant, work)
            stamp.parent.mkdir(exist_ok=True)
            digest = _digest(_library(variant, work))
            save_json(stamp, {**_made_of(architecture), "library": digest, **result})
    return failed


def _begun(
    variants: Sequence[str], architecture: str, work: Path
) -> dict[str, subprocess.Popen[bytes]]:
    """A build of every variant, all under way."""
    jobs = max(1, (os.cpu_count() or 1) // max(1, len(variants)))
    running = {}
    for variant in variants:
        target_folder(variant, work).mkdir(parents=True, exist_ok=True)
        build = ["cmake", "--build", str(work / f"build-{variant}"), "--parallel", str(jobs), "-v"]
        configure = configure_command(variant, architecture, work)
        script = f"{shlex.join(configure)} && {shlex.join(build)}"
        with _log(variant, work).open("w") as output:
            running[variant] = subprocess.Popen(
                ["sh", "-c", script], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )
    return running


def _log(variant: str, work: Path) -> Path:
    return work / "logs" / f"build-{variant}.log"


def _stamp(variant: str, work: Path) -> Path:
    return work / f"build-{variant}" / "built.json"


def _library(variant: str, work: Path) -> Path:
    return target_folder(variant, work) / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def _digest(path: Path) -> str:
    """Of a file's content; empty where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _made_of(architecture: str) -> dict[str, str]:
    """What a build is of: another of these is another build."""
    return {
        "sources": facts.sources(folders=facts.NATIVE),
        "architecture": architecture,
        "suffix": str(sysconfig.get_config_var("EXT_SUFFIX")),
        "CMAKE_ARGS": os.environ.get("CMAKE_ARGS", ""),
    }


def built_before(variant: str, architecture: str, work: Path) -> dict[str, Any]:
    """What is known of a variant that is there already, perhaps brought from another machine; empty
    where it is not of these sources, another program has replaced it, or this machine cannot load
    it."""
    path = _library(variant, work)
    found = read(_stamp(variant, work))
    wanted = {**_made_of(architecture), "library": _digest(path)}
    if not path.is_file() or any(found.get(key) != value for key, value in wanted.items()):
        return {}
    load = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    tried = subprocess.run([sys.executable, "-c", load, str(path)], stderr=subprocess.DEVNULL)
    return found if tried.returncode == 0 else {}


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
    if smoke and (path := smoke_extension(work_folder())) is not None:
        load_extension(path)


def load_extension(path: Path) -> None:
    """Makes the package use the extension in this file."""
    spec = importlib.util.spec_from_file_location(EXTENSION, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[EXTENSION] = module


def loaded_variant() -> str:
    """Which build the package uses: "smoke" or "normal"."""
    path, module = smoke_extension(work_folder()), sys.modules.get(EXTENSION)
    return "smoke" if path and module and module.__file__ == str(path) else "normal"
