"""The CPU backend, on the kernels of ``csrc/cpu``: float16, bfloat16, float32 and float64 logits,
whose gradient has their dtype."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .native import NativeBackend


@lru_cache(maxsize=64)
def _on_threads(native: ModuleType, threads: int) -> Any:
    return native.Launch(threads=threads)


def _launch(native: ModuleType, logits: Tensor, columns: int) -> Any:
    return _on_threads(native, torch.get_num_threads())


BACKEND = NativeBackend(_launch)
token_stats_fwd = BACKEND.token_stats_fwd
token_stats_bwd = BACKEND.token_stats_bwd
policy_loss_fwd = BACKEND.policy_loss_fwd
scale_ = BACKEND.scale_
