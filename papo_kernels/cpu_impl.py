"""The native CPU backend: torch tensors in, the compiled kernels of ``csrc/cpu`` underneath.

The four functions of the backend protocol. ``logits`` is ``[N, V]`` with unit column stride and any
row stride; row tensors are contiguous ``[N]`` in the accumulation dtype (float32, or float64 for
float64 logits); targets are int64. Arguments have been validated by ``functional.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from papo_kernels import _native
from papo_kernels.types import STATE_SIZE, acc_dtype

if TYPE_CHECKING:
    from papo_kernels.types import PolicyLossParams, RowParams, TokenInputs, WeightingInputs

_DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_SHAPE_CODE = {"sign": 1, "tanh": 2}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor) -> Any:
    rows, cols = tensor.shape
    return _native.module().Matrix(
        tensor.data_ptr(), rows, cols, tensor.stride(0), _DTYPE_CODE[tensor.dtype]
    )


def _row_params(row: RowParams) -> Any:
    return _native.module().RowParams(row.temperature, row.softcap, row.vocab_size)


def _launch() -> Any:
    return _native.module().Launch(threads=torch.get_num_threads())


def _row_tensor(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # Upstream gradients come from autograd in whatever layout, expanded scalars included.
    return None if tensor is None else tensor.to(dtype).contiguous()


def _check_dlogits(logits: Tensor, dlogits: Tensor) -> None:
    if dlogits.dtype != logits.dtype:
        raise TypeError(f"dlogits: expected {logits.dtype} like logits, got {dlogits.dtype}")


def token_stats_fwd(
    logits: Tensor, targets: Tensor, row: RowParams, state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of every row in one pass, or finished from ``state``: see ``reference.py``."""
    native = _native.module()
    rows = logits.shape[0]
    acc = acc_dtype(logits.dtype)
    logp, entropy, unit_polarity, lse = (torch.empty(rows, dtype=acc) for _ in range(4))
    new_state = torch.empty(rows, STATE_SIZE, dtype=torch.float64)
    outputs = (logp, entropy, unit_polarity, lse, new_state)
    native.token_stats_fwd(
        _matrix(logits),
        targets.data_ptr(),
        _address(state),
        _row_params(row),
        native.TokenStatsOut(*map(_address, outputs)),
        _launch(),
    )
    return outputs


def token_stats_bwd(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    row: RowParams,
    dlogits: Tensor | None = None,
) -> Tensor:
    """``dlogits`` (allocated where not given, may be the logits) for upstream gradients of logp,
    entropy and unit polarity; ``None`` stands for zero."""
    native = _native.module()
    upstream = [_row_tensor(g, acc_dtype(logits.dtype)) for g in grads]
    if dlogits is None:
        dlogits = torch.empty(logits.shape, dtype=logits.dtype)
    _check_dlogits(logits, dlogits)
    native.token_stats_bwd(
        _matrix(logits),
        targets.data_ptr(),
        state.data_ptr(),
        native.TokenStatsGrads(*map(_address, upstream)),
        _row_params(row),
        _matrix(dlogits),
        _launch(),
    )
    return dlogits


def policy_loss_fwd(
    logits: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    params: PolicyLossParams,
    weighting: WeightingInputs | None,
    row: RowParams,
    dlogits: Tensor | None,
    state: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The policy loss per token and, where ``dlogits`` is given, the gradient of its sum: see
    ``reference.py``."""
    native = _native.module()
    if dlogits is not None:
        _check_dlogits(logits, dlogits)
    rows = logits.shape[0]
    acc = acc_dtype(logits.dtype)
    out = [torch.empty(rows, dtype=acc) for _ in range(7)]
    out.append(torch.empty(rows, dtype=torch.bool))
    # Named until the call returns: the kernels hold bare pointers.
    scalars: list[Tensor] = []
    if weighting is None:
        native_weighting = native.Weighting(0, 0.0, 0.0, 0, 0, 0)
    else:
        scalars = [s.to(acc) for s in (weighting.phase, weighting.sigma, weighting.scale)]
        native_weighting = native.Weighting(
            _SHAPE_CODE[weighting.shape],
            weighting.strength,
            weighting.dead_zone,
            *map(_address, scalars),
        )
    native.policy_loss(
        _matrix(logits),
        native.TokenInputs(
            targets.data_ptr(),
            tokens.advantages.data_ptr(),
            tokens.token_weight.data_ptr(),
            _address(tokens.old_logp),
            _address(tokens.ref_logp),
            _address(state),
        ),
        native.PolicyLossParams(
            params.clip_low,
            params.clip_high,
            params.dual_clip or 0.0,
            params.kl_coef,
            params.entropy_coef,
        ),
        native_weighting,
        _row_params(row),
        native.PolicyLossOut(*map(_address, out)),
        native.Matrix(0, 0, 0, 0, 0) if dlogits is None else _matrix(dlogits),
        _launch(),
    )
    return tuple(out)


def scale_(dlogits: Tensor, factor: Tensor) -> None:
    """``dlogits *= factor`` for a 0-dim ``factor``; nothing is touched where it is 1."""
    native = _native.module()
    factor = factor.to(acc_dtype(dlogits.dtype))
    native.scale(_matrix(dlogits), factor.data_ptr(), _launch())
