"""The inside of a stage: ``worker.main(["timing", "resident"])`` calls `timing.run(notes,
"resident")`. Also a program of its own, ``python -m benchmarks.gpu_check.worker timing resident``,
for tools that start programs.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check import rehearsal
from benchmarks.gpu_check.files import Notes

STAGE, NOTES, WORK = "PAPO_GPU_CHECK_STAGE", "PAPO_GPU_CHECK_NOTES", "PAPO_GPU_CHECK_WORK"
KINDS = (
    "probe",
    "build",
    "warm",
    "smoke",
    "timing",
    "sweep",
    "counters",
    "counted",
    "linear",
    "comparison",
    "training",
)
LOST = 3  # exit status of a process whose CUDA context can no longer be used


def work_folder() -> Path:
    """Where this check keeps its builds, logs and notes."""
    return Path(os.environ[WORK])


def main(arguments: Sequence[str]) -> int:
    """Runs a stage's work, and returns its exit status."""
    kind, *rest = arguments
    if kind not in KINDS:
        raise ValueError(f"expected one of {KINDS}, got {kind!r}")
    faulthandler.enable()
    rehearsal.maybe_fail(os.environ.get(STAGE, kind))
    notes = Notes(Path(os.environ.get(NOTES, f"{kind}.json")))
    build = importlib.import_module("benchmarks.gpu_check.build")
    build.release_extension(smoke=kind == "smoke" and "sanitized" not in rest)
    code = importlib.import_module(f"benchmarks.gpu_check.{kind}").run(notes, *rest)
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
