"""The CUDA backend: torch tensors in, the compiled kernels of ``csrc/cuda`` underneath.

The four functions of the backend protocol, for float16, bfloat16 and float32 logits on one NVIDIA
GPU; see ``cpu_impl.py`` for the layouts and ``reference.py`` for what each function does. Calls run
on the current stream of the logits' device, whichever device is current, never synchronise,
allocate only what they return, and may be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from papo_kernels import _marshal, _native
from papo_kernels.types import STATE_SIZE

if TYPE_CHECKING:
    from papo_kernels.types import PolicyLossParams, RowParams, TokenInputs, WeightingInputs

_HALVES = (torch.bfloat16, torch.float16)


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
    device = logits.get_device()
    return native.Launch(1, device, torch._C._cuda_getCurrentRawStream(device))


def _check_dlogits(logits: Tensor, dlogits: Tensor) -> None:
    narrower = logits.dtype == torch.float32 and dlogits.dtype in _HALVES
    if dlogits.dtype != logits.dtype and not narrower:
        raise TypeError(
            f"dlogits: expected {logits.dtype} like logits, or float16 or bfloat16 where those are "
            f"float32, got {dlogits.dtype}"
        )


def token_stats_fwd(
    logits: Tensor, targets: Tensor, row: RowParams, state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of every row in one pass, or finished from ``state``: see ``reference.py``."""
    native = _native.module()
    rows = logits.shape[0]
    logp, entropy, unit_polarity, lse = (
        logits.new_empty(rows, dtype=torch.float32) for _ in range(4)
    )
    new_state = logits.new_empty((rows, STATE_SIZE), dtype=torch.float64)
    outputs = (logp, entropy, unit_polarity, lse, new_state)
    native.token_stats_fwd(
        _marshal.matrix(native, logits),
        targets.data_ptr(),
        _marshal.address(state),
        _marshal.row_params(native, row),
        _marshal.token_stats_out(native, outputs),
        _launch(native, logits),
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
    # Named until the call returns: the kernels hold bare pointers.
    upstream = _marshal.upstream(grads, logits)
    if dlogits is None:
        dlogits = logits.new_empty(logits.shape)
    _check_dlogits(logits, dlogits)
    native.token_stats_bwd(
        _marshal.matrix(native, logits),
        targets.data_ptr(),
        state.data_ptr(),
        _marshal.token_stats_grads(native, upstream),
        _marshal.row_params(native, row),
        _marshal.matrix(native, dlogits),
        _launch(native, logits),
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
    out = [logits.new_empty(rows, dtype=torch.float32) for _ in range(7)]
    out.append(logits.new_empty(rows, dtype=torch.bool))
    scalars = _marshal.weighting_scalars(weighting, torch.float32)
    native.policy_loss(
        _marshal.matrix(native, logits),
        _marshal.token_inputs(native, targets, tokens, state),
        _marshal.policy_loss_params(native, params),
        _marshal.weighting_struct(native, weighting, scalars),
        _marshal.row_params(native, row),
        _marshal.policy_loss_out(native, out),
        _marshal.matrix(native, dlogits),
        _launch(native, logits),
    )
    return tuple(out)


def scale_(dlogits: Tensor, factor: Tensor) -> None:
    """``dlogits *= factor`` for a 0-dim ``factor``; nothing is touched where it is 1."""
    native = _native.module()
    factor = factor.to(torch.float32)
    native.scale(_marshal.matrix(native, dlogits), factor.data_ptr(), _launch(native, dlogits))
