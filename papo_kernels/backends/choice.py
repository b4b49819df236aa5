"""Which backend serves a call: the argument, else ``PAPO_BACKEND``, else the fastest that can.

A backend is a module with the four functions of ``reference.py``'s protocol. Modules are imported
when first chosen, so that importing papo_kernels needs neither a compiler nor a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch

log = logging.getLogger("papo_kernels")

_MODULES = {
    "reference": "papo_kernels.reference",
    "cpu": "papo_kernels.backends.cpu",
    "triton": "papo_kernels.backends.triton",
    "cuda": "papo_kernels.backends.cuda",
}
BACKENDS = tuple(_MODULES)
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def _cannot_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    from . import extension as _native

    if device.type != "cpu":
        return f"it serves CPU tensors, not {device.type}"
    return None if _native.available() else _native.why_unavailable()


def _cannot_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    from . import extension as _native

    if device.type != "cuda":
        return f"it serves CUDA tensors, not {device.type}"
    if dtype == torch.float64:
        return "float64 logits are served by reference and cpu only"
    if not _native.available():
        return _native.why_unavailable()
    if not _native.has_cuda():
        return "the extension was built without CUDA (no nvcc, or PAPO_CUDA=off)"
    implementation = importlib.import_module(_MODULES["cuda"])
    reason: str | None = implementation.why_unavailable(device)
    return reason


def _cannot_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "float64 logits are served by reference and cpu only"
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it serves GPU tensors (CPU tensors only with TRITON_INTERPRET=1)"
    return None


_CANNOT: dict[str, Callable[[torch.device, torch.dtype], str | None]] = {
    "reference": lambda device, dtype: None,
    "cpu": _cannot_cpu,
    "triton": _cannot_triton,
    "cuda": _cannot_cuda,
}


@cache
def _choose(requested: str | None, source: str, device: torch.device, dtype: torch.dtype) -> str:
    if requested is not None:
        if requested not in _MODULES:
            raise ValueError(f"{source}: expected one of {BACKENDS}, got {requested!r}")
        reason = _CANNOT[requested](device, dtype)
        if reason is not None:
            raise ValueError(f"{source}: {requested!r} cannot serve this call: {reason}")
        log.info("%s for %s logits on %s (asked for by %s)", requested, dtype, device, source)
        return requested
    passed_over = []
    for name in _PREFERENCE.get(device.type, ("reference",)):
        reason = _CANNOT[name](device, dtype)
        if reason is None:
            break
        passed_over.append(f"{name}: {reason}")
    why = f" ({'; '.join(passed_over)})" if passed_over else ""
    level = logging.WARNING if name == "reference" else logging.INFO
    log.log(level, "%s for %s logits on %s%s", name, dtype, device, why)
    return name


def choose(requested: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that serves logits of `dtype` on `device`.

    Args:
        requested: a backend's name, or None for ``PAPO_BACKEND`` or else the fastest that can.

    Raises:
        ValueError: an unknown backend, or one that was asked for and cannot serve, with the reason.
    """
    source = "backend"
    if requested is None:
        requested, source = os.environ.get("PAPO_BACKEND") or None, "PAPO_BACKEND"
    return _choose(requested, source, device, dtype)


@cache
def module(name: str) -> ModuleType:
    """The module that implements backend `name`."""
    return importlib.import_module(_MODULES[name])
