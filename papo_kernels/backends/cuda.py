"""The CUDA backend, on the kernels of ``csrc/cuda``: float16, bfloat16 and float32 logits on one
NVIDIA GPU.

Calls run on the current stream of the logits' device, whichever device is current, never
synchronise, allocate only what they return, and may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from papo_kernels.checks import HALVES, check_columns

from . import tuning
from .native import DTYPE_CODE, NativeBackend


@cache
def why_unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve tensors on `device`; None if it can."""
    if torch.version.hip is not None:
        return "it serves NVIDIA GPUs, and this torch was built for AMD"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, {device} has {major}.{minor}"
    return None


# csrc/include/papo/params.h has their names.
_KERNEL_CODE = {None: 0, "resident": 1, "streamed": 2}


def _stats_code(stats: Sequence[int] | None, forced: tuning.ForcedTile) -> int:
    if stats is None:
        return 0
    if not any(stats):
        return 2
    return 1 if forced.stats is None else 3  # forced: whatever the number of rows


@lru_cache(maxsize=256)
def _choice(
    native: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    columns: int,
    forced: tuning.ForcedTile,
) -> Any:
    """How rows are cut: as the environment says, else as the table does.

    Raises:
        ValueError: the device cannot do it, with the limit that stands against it.
    """
    config = tuning.config("cuda", device, dtype, columns)
    tile = forced.tile or (config["tile"] if forced.kernel is None else None)
    stats = forced.stats or (config["stats"] if forced == tuning.NOT_FORCED else None)
    choice = native.TileChoice(
        _KERNEL_CODE[forced.kernel],
        *(tile or (0,) * 5),
        _stats_code(stats, forced),
        *(stats or (0,) * 3),
    )
    try:
        native.check_tile(columns, DTYPE_CODE[dtype], device.index or 0, choice)
    except ValueError as error:
        asked = forced if forced != tuning.NOT_FORCED else f"tuning.json: {config}"
        raise ValueError(f"{asked}: does not fit V = {columns} in {dtype}: {error}") from None
    return choice


def _launch(native: ModuleType, logits: Tensor, columns: int) -> Any:
    """The current stream of the logits' device."""
    check_columns(logits)
    device = logits.get_device()
    stream = torch._C._cuda_getCurrentRawStream(device)
    if columns == 0:
        return native.Launch(1, device, stream)
    choice = _choice(native, logits.device, logits.dtype, columns, tuning.forced())
    return native.Launch(1, device, stream, choice)


BACKEND = NativeBackend(_launch, narrow=HALVES)
token_stats_fwd = BACKEND.token_stats_fwd
token_stats_bwd = BACKEND.token_stats_bwd
policy_loss_fwd = BACKEND.policy_loss_fwd
scale_ = BACKEND.scale_
