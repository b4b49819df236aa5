"""A check without a GPU: ``python -m benchmarks.gpu_check --rehearse``.

Every stage of all calls runs on tiny inputs on the CPU: `target.py` names the backends that stand
in for the GPU's, and the tools that a GPU machine has are scripts written here. Faults show that
each costs its own stage and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT

ACTIVE, FAULTS = "PAPO_GPU_CHECK_REHEARSAL", "PAPO_GPU_CHECK_FAULTS"

# What fails, and how: stages by their names, one candidate of a sweep.
DEFAULT_FAULTS = {
    "smoke-streamed": "abort",
    "timing-resident": "hang",
    "linear": "raise",
    "sweep-cuda|tile [2,300] bfloat16|2,4,1,3,2": "abort",
}
HANGS = "timing-resident"
HANG_LIMIT = 2.5  # seconds, in the place of the hung stage's limit

# Of one kernel, as ptxas and ncu report it.
_PTXAS = """ptxas info    : Compiling entry function '_Z15resident_kernelv' for 'sm_90a'
ptxas info    : Function properties for _Z15resident_kernelv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 126 registers, used 1 barriers"""
_NCU = """"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"
"","","byte","byte","ns"
"0","resident_kernel","2500","1200","4000\""""

# Written as executables. Those that start a program run it where that is cheap.
_TOOLS = {
    "nvidia-smi": "echo 'Rehearsed GPU, 000.00, 1980, 3201, 1980, 3201, 40, 300.00'",
    "nvcc": "echo 'Cuda compilation tools, release 13.0, V13.0.0'",
    "cmake": f"""cat <<'TEXT'
{_PTXAS}
TEXT
for argument in "$@"; do case $argument in
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=*/smoke) cp {ROOT}/papo_kernels/_C*.so "${{argument#*=}}";;
esac; done
exit 0""",
    "ncu": f"""cat <<'TEXT'
{_NCU}
TEXT""",
    "compute-sanitizer": """if [ "$1" = --help ]; then echo --kernel-name; exit; fi
echo '========= ERROR SUMMARY: 0 errors'""",
    "deepspeed": f'exec {sys.executable} -m benchmarks.gpu_check.rehearsed_training "$@"',
}

_TESTS = """
def test_that_passes():
    pass

def test_that_fails():
    assert 1 + 1 == 3, "as rehearsed"
"""


def active() -> bool:
    """Whether this is a rehearsal."""
    return ACTIVE in os.environ


def maybe_fail(key: str) -> None:
    """In a rehearsal: aborts, hangs or raises where a fault is planned for `key`."""
    kind = json.loads(os.environ.get(FAULTS, "{}")).get(key) if active() else None
    if kind == "abort":
        os.abort()
    if kind == "hang":
        signal.pause()
    if kind == "raise":
        raise RuntimeError(f"rehearsed failure of {key}")


def prepare(folder: Path, faults: dict[str, str]) -> None:
    """Sets this process, and those it starts, up for a rehearsal: tools in `folder`."""
    tools = folder / "tools"
    tools.mkdir(parents=True, exist_ok=True)
    for name, text in _TOOLS.items():
        path = tools / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    (folder / "test_rehearsed.py").write_text(_TESTS)
    os.environ.pop("CUDACXX", None)
    os.environ.update(
        {
            ACTIVE: "1",
            FAULTS: json.dumps(faults),
            "PATH": f"{tools}:{os.environ['PATH']}",
            "TRITON_INTERPRET": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
        }
    )


def pytest_arguments(folder: Path) -> Sequence[str]:
    """In the place of the tests that need a GPU: one that passes and one that fails."""
    return (f"{folder}/test_rehearsed.py", f"--rootdir={folder}", "--noconftest", "-c", os.devnull)


def as_planned(stages: dict[str, dict[str, Any]]) -> bool:
    """Whether the stages that failed are those of them with a fault, and those whose test does."""
    faults = stages.keys() & json.loads(os.environ[FAULTS])
    tests = {name for name, stage in stages.items() if "failures" in stage}
    return {name for name, stage in stages.items() if not stage["ok"]} == faults | tests
