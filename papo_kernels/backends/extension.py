"""Loads the compiled extension ``papo_kernels._C`` and says why when it cannot be used."""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch

# As csrc/include/papo/params.h numbers them.
DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
CPU_ISAS = ("avx512_bf16", "avx512", "avx2", "portable")


def _import() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("papo_kernels._C"), ""
    except Exception as error:  # a broken build raises more than ImportError
        return None, (
            f"the compiled extension papo_kernels._C is not available ({error}); "
            "build it with `pip install -e .`, which needs a C++17 compiler"
        )


# Not in the first call: what the extension registers for forks has to be there before a process
# forks, or the child waits for its parent's OpenMP threads.
_import()


@cache
def _load() -> tuple[ModuleType | None, str]:
    wanted = os.environ.get("PAPO_CPU_ISA", "")
    if wanted and wanted not in CPU_ISAS:
        return None, f"PAPO_CPU_ISA={wanted!r}: expected one of {', '.join(CPU_ISAS)}"
    module, why = _import()
    if module is None:
        return None, why
    if wanted and module.cpu_isa() != wanted:
        return None, f"PAPO_CPU_ISA={wanted!r}: this machine offers {module.cpu_isa()!r} at most"
    return module, ""


def available() -> bool:
    """Whether the extension can be used."""
    return _load()[0] is not None


def why_unavailable() -> str:
    """Why :func:`available` is false, in one line; empty when it is true."""
    return _load()[1]


def loaded() -> ModuleType | None:
    """The extension, None where it cannot be used."""
    return _load()[0]


def has_cuda() -> bool:
    """Whether the extension was built with its CUDA kernels (says nothing of the machine)."""
    module = _load()[0]
    return module is not None and bool(module.has_cuda)


@cache
def module() -> ModuleType:
    """The extension.

    Raises:
        RuntimeError: it is missing or ``PAPO_CPU_ISA`` asks for what this machine lacks.
    """
    loaded, why = _load()
    if loaded is None:
        raise RuntimeError(why)
    return loaded


def cpu_isa() -> str:
    """The instruction set the CPU kernels use, one of `CPU_ISAS`."""
    return str(module().cpu_isa())
