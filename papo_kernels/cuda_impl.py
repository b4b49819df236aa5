"""The CUDA backend, on the kernels of ``csrc/cuda``: float16, bfloat16 and float32 logits on one
NVIDIA GPU.

Calls run on the current stream of the logits' device, whichever device is current, never
synchronise, allocate only what they return, and may be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._native_impl import NativeBackend
from .checks import HALVES, check_columns


@cache
def why_unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve tensors on `device`; None if it can."""
    if torch.version.hip is not None:
        return "it serves NVIDIA GPUs, and this torch was built for AMD"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, {device} has {major}.{minor}"
    return None


def _launch(native: ModuleType, logits: Tensor) -> Any:
    """The current stream of the logits' device."""
    check_columns(logits)
    device = logits.get_device()
    return native.Launch(1, device, torch._C._cuda_getCurrentRawStream(device))


BACKEND = NativeBackend(_launch, narrow=HALVES)
token_stats_fwd = BACKEND.token_stats_fwd
token_stats_bwd = BACKEND.token_stats_bwd
policy_loss_fwd = BACKEND.policy_loss_fwd
scale_ = BACKEND.scale_
