"""Tensors as the extension's plain structs, for the native backends.

The structs hold bare addresses: whoever makes one keeps its tensors alive until the call returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .types import acc_dtype

if TYPE_CHECKING:
    from .types import PolicyLossParams, RowParams, TokenInputs, WeightingInputs

_DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_SHAPE_CODE = {"sign": 1, "tanh": 2}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def matrix(native: ModuleType, tensor: Tensor | None) -> Any:
    """`tensor [N, V]` with unit column stride; a matrix without data for None."""
    if tensor is None:
        return native.Matrix(0, 0, 0, 0, 0)
    rows, cols = tensor.shape
    return native.Matrix(tensor.data_ptr(), rows, cols, tensor.stride(0), _DTYPE_CODE[tensor.dtype])


@lru_cache(maxsize=64)
def row_params(native: ModuleType, row: RowParams) -> Any:
    return native.RowParams(row.temperature, row.softcap, row.vocab_size)


@lru_cache(maxsize=64)
def policy_loss_params(native: ModuleType, params: PolicyLossParams) -> Any:
    return native.PolicyLossParams(
        params.clip_low,
        params.clip_high,
        params.dual_clip or 0.0,
        params.kl_coef,
        params.entropy_coef,
    )


def token_inputs(
    native: ModuleType, targets: Tensor, tokens: TokenInputs, state: Tensor | None
) -> Any:
    return native.TokenInputs(
        targets.data_ptr(),
        tokens.advantages.data_ptr(),
        tokens.token_weight.data_ptr(),
        address(tokens.old_logp),
        address(tokens.ref_logp),
        address(state),
    )


def token_stats_out(native: ModuleType, outputs: Iterable[Tensor]) -> Any:
    return native.TokenStatsOut(*map(address, outputs))


def token_stats_grads(native: ModuleType, grads: Iterable[Tensor | None]) -> Any:
    return native.TokenStatsGrads(*map(address, grads))


def policy_loss_out(native: ModuleType, outputs: Iterable[Tensor]) -> Any:
    return native.PolicyLossOut(*map(address, outputs))


def weighting_scalars(weighting: WeightingInputs | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """phase, sigma and scale in `dtype`, to be held until the call returns."""
    if weighting is None:
        return ()
    return tuple(s.to(dtype) for s in (weighting.phase, weighting.sigma, weighting.scale))


def weighting_struct(
    native: ModuleType, weighting: WeightingInputs | None, scalars: tuple[Tensor, ...]
) -> Any:
    if weighting is None:
        return native.Weighting(0, 0.0, 0.0, 0, 0, 0)
    code = _SHAPE_CODE[weighting.shape]
    return native.Weighting(code, weighting.strength, weighting.dead_zone, *map(address, scalars))


def upstream(grads: Iterable[Tensor | None], logits: Tensor) -> tuple[Tensor | None, ...]:
    """Upstream gradients as contiguous rows in the accumulation dtype; they come from autograd in
    whatever layout, expanded scalars included."""
    dtype = acc_dtype(logits.dtype)
    return tuple(None if g is None else g.to(dtype).contiguous() for g in grads)
