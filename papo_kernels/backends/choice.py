"""Which backend serves a call: the argument, else ``PAPO_BACKEND``, else the fastest that can."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache

import torch

from .protocol import Backend

log = logging.getLogger("papo_kernels")


# Each is imported when first asked for: to import papo_kernels takes neither compiler nor triton.
def _reference() -> Backend:
    from .reference import REFERENCE

    return REFERENCE


def _cpu() -> Backend:
    from .native import CPU

    return CPU


def _triton() -> Backend:
    from .triton import TRITON

    return TRITON


def _cuda() -> Backend:
    from .native import CUDA

    return CUDA


_BY_NAME: dict[str, Callable[[], Backend]] = {
    "reference": _reference,
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
}
BACKENDS = tuple(_BY_NAME)
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def named(name: str) -> Backend:
    """The backend called `name`, whether or not it can serve anything here."""
    return _BY_NAME[name]()


def _why_not(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    return backend.capabilities.why_refused(device, dtype) or backend.why_unavailable(device)


@cache
def _choose(
    requested: str | None, source: str, device: torch.device, dtype: torch.dtype
) -> Backend:
    if device.type == "meta":
        raise ValueError("logits: expected a tensor with values, got one on meta")
    if requested is not None:
        if requested not in BACKENDS:
            raise ValueError(f"{source}: expected one of {BACKENDS}, got {requested!r}")
        backend = named(requested)
        reason = _why_not(backend, device, dtype)
        if reason is not None:
            raise ValueError(f"{source}: {requested!r} cannot serve this call: {reason}")
        log.info("%s for %s logits on %s (asked for by %s)", requested, dtype, device, source)
        return backend
    passed_over = []
    for name in _PREFERENCE.get(device.type, ("reference",)):
        backend = named(name)
        reason = _why_not(backend, device, dtype)
        if reason is None:
            break
        passed_over.append(f"{name}: {reason}")
    why = f" ({'; '.join(passed_over)})" if passed_over else ""
    level = logging.WARNING if name == "reference" else logging.INFO
    log.log(level, "%s for %s logits on %s%s", name, dtype, device, why)
    return backend


def choose(requested: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that serves logits of `dtype` on `device`.

    Args:
        requested: a backend's name, or None for ``PAPO_BACKEND`` or else the fastest that can.

    Raises:
        ValueError: an unknown backend, or one that was asked for and cannot serve, with the reason.
    """
    source = "backend"
    if requested is None:
        requested, source = os.environ.get("PAPO_BACKEND") or None, "PAPO_BACKEND"
    return _choose(requested, source, device, dtype)
