"""The native CPU backend: torch tensors in, the compiled kernels of ``csrc/cpu`` underneath.

The four functions of the backend protocol. ``logits`` is ``[N, V]`` with unit column stride and any
row stride; row tensors are contiguous ``[N]`` in the accumulation dtype (float32, or float64 for
float64 logits); targets are int64. Arguments have been validated by ``functional.py``.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from papo_kernels import _marshal, _native
from papo_kernels.types import STATE_SIZE, acc_dtype

if TYPE_CHECKING:
    from papo_kernels.types import PolicyLossParams, RowParams, TokenInputs, WeightingInputs


def _launch(native: ModuleType) -> Any:
    return native.Launch(threads=torch.get_num_threads())


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
        _marshal.matrix(native, logits),
        targets.data_ptr(),
        _marshal.address(state),
        _marshal.row_params(native, row),
        _marshal.token_stats_out(native, outputs),
        _launch(native),
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
    upstream = _marshal.upstream(grads, logits)
    if dlogits is None:
        dlogits = torch.empty(logits.shape, dtype=logits.dtype)
    _check_dlogits(logits, dlogits)
    native.token_stats_bwd(
        _marshal.matrix(native, logits),
        targets.data_ptr(),
        state.data_ptr(),
        _marshal.token_stats_grads(native, upstream),
        _marshal.row_params(native, row),
        _marshal.matrix(native, dlogits),
        _launch(native),
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
    scalars = _marshal.weighting_scalars(weighting, acc)
    native.policy_loss(
        _marshal.matrix(native, logits),
        _marshal.token_inputs(native, targets, tokens, state),
        _marshal.policy_loss_params(native, params),
        _marshal.weighting_struct(native, weighting, scalars),
        _marshal.row_params(native, row),
        _marshal.policy_loss_out(native, out),
        _marshal.matrix(native, dlogits),
        _launch(native),
    )
    return tuple(out)


def scale_(dlogits: Tensor, factor: Tensor) -> None:
    """``dlogits *= factor`` for a 0-dim ``factor``; nothing is touched where it is 1."""
    native = _native.module()
    factor = factor.to(acc_dtype(dlogits.dtype))
    native.scale(_marshal.matrix(native, dlogits), factor.data_ptr(), _launch(native))
