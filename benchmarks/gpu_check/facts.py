"""What the figures were taken under, read without touching the device."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, host_environment

_QUERIES = (
    ("gpu", "name"),
    ("driver", "driver_version"),
    ("SM MHz", "clocks.sm"),
    ("memory MHz", "clocks.mem"),
    ("most SM MHz", "clocks.max.sm"),
    ("most memory MHz", "clocks.max.mem"),
    ("celsius", "temperature.gpu"),
    ("watts", "power.draw"),
)

NATIVE = {"csrc": (".cu", ".cuh", ".cpp", ".h", ".txt", ".cmake")}
_SOURCES = {**NATIVE, "papo_kernels": (".py", ".json"), "benchmarks": (".py", ".cpp")}


def output_of(command: list[str], seconds: float = 20) -> str:
    """A program's output; empty where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def gpu_now() -> dict[str, str]:
    """Name, driver, clocks, temperature and power of the first GPU; nothing is set."""
    query = ",".join(field for _, field in _QUERIES)
    text = output_of(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"])
    values = text.splitlines()[0].split(", ") if text else []
    return dict(zip((name for name, _ in _QUERIES), values, strict=False))


def environment() -> dict[str, Any]:
    """Versions and the GPU's state."""
    release = re.search(r"release [\d.]+, V([\d.]+)", output_of([nvcc() or "nvcc", "--version"]))
    return {
        **host_environment(),
        "sources": sources(),
        "torch's CUDA": str(torch.version.cuda),
        "nvcc": release[1] if release else "none found",
        **gpu_now(),
    }


def sources(root: Path = ROOT, folders: Mapping[str, Sequence[str]] = _SOURCES) -> str:
    """A digest of what the figures depend on: the kernels, their table and the benchmarks; of the
    extension's sources alone with `NATIVE`. It knows what a commit does not, in a tree that is not
    clean or without git."""
    found = [root / "CMakeLists.txt"]
    for folder, suffixes in folders.items():
        found += [path for path in (root / folder).rglob("*") if path.suffix in suffixes]
    digest = hashlib.sha256()
    for path in sorted(found):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


def nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def beside_nvcc(tool: str) -> str | None:
    """A tool of the CUDA toolkit, on PATH or where nvcc is."""
    compiler = nvcc()
    folder = str(Path(compiler).resolve().parent) if compiler else ""
    return shutil.which(tool) or shutil.which(tool, path=folder)
