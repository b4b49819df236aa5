"""The torch operations: schemas, fake implementations and autograd, one of each per operation.

Here the statistics and what all operations share; the losses are in `loss_ops.py`, those of hidden
states in `linear_ops.py`. Nothing else registers with torch. The operations take flattened rows
(``functional.py`` flattens) and resolve the backend when they run, so a compiled graph does not
depend on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import _native
from . import backend as backends
from .types import IGNORE_INDEX, STATE_SIZE, RowParams, acc_dtype


def backend_for(requested: str, logits: Tensor) -> Any:
    return backends.module(backends.choose(requested or None, logits.device, logits.dtype))


def check_target_values(targets: Tensor, vocab_size: int) -> None:
    """On a CPU a bad target raises before anything runs; GPU kernels guard their reads instead."""
    if targets.device.type != "cpu":
        return
    native = _native.loaded()
    if native is not None:
        at = native.first_bad_target(targets.data_ptr(), targets.numel(), vocab_size)
    else:
        bad = ((targets < 0) | (targets >= vocab_size)) & (targets != IGNORE_INDEX)
        at = int(bad.nonzero()[0]) if bad.any() else -1
    if at >= 0:
        raise ValueError(
            f"targets: expected values in [0, {vocab_size}) or {IGNORE_INDEX} (ignored), got "
            f"{int(targets[at])} at flat position {at}"
        )


def is_plain(tensor: Tensor) -> bool:
    """Whether a call on `tensor` may go to its kernel directly: nothing traces or intercepts it.

    torch's dispatcher spends more time in Python than a small kernel takes. Graphs, fake tensors,
    subclasses and dispatch modes need it.
    """
    return (
        type(tensor) in _PLAIN_TYPES
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "papo_kernels: the backward pass is not differentiable; "
            "call backward() or autograd.grad() without create_graph=True"
        )


def refuse_lse(g_lse: Tensor | None) -> None:
    if g_lse is not None:
        raise RuntimeError(
            "papo_kernels: TokenStats.lse is not differentiable; detach() it where it enters a loss"
        )


# ---- scale_ --------------------------------------------------------------------------------------


def _scale_(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    """`dlogits [N, V] *= factor` (0-dim); free where the factor is 1."""
    backend_for(backend, dlogits).scale_(dlogits, factor)


scale_ = custom_op("papo::scale_", _scale_, mutates_args=("dlogits",))


@scale_.register_fake
def _(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    return None


def run_scale_(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    """`scale_`, by the shortest way."""
    (_scale_ if is_plain(dlogits) else scale_)(dlogits, factor, backend)


# ---- token_stats --------------------------------------------------------------------------------


def _token_stats(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, unit_polarity, lse `[N]` and the row state `[N, 6]` that backward needs."""
    check_target_values(targets, vocab_size)
    row = RowParams(temperature, softcap, vocab_size)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    outputs = backend_for(backend, logits).token_stats_fwd(logits, targets, row)
    return outputs


token_stats = custom_op("papo::token_stats", _token_stats, mutates_args=())


@token_stats.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, acc = logits.shape[0], acc_dtype(logits.dtype)
    logp, entropy, unit_polarity, lse = (logits.new_empty(n, dtype=acc) for _ in range(4))
    return logp, entropy, unit_polarity, lse, logits.new_empty((n, STATE_SIZE), dtype=torch.float64)


def _token_stats_bwd(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    g_unit_polarity: Tensor | None,
    temperature: float,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> Tensor:
    """dlogits `[N, V]` for upstream gradients `[N]`, None being zero."""
    upstream = tuple(
        None if g is None else g.to(acc_dtype(logits.dtype)).contiguous()
        for g in (g_logp, g_entropy, g_unit_polarity)
    )
    row = RowParams(temperature, softcap, vocab_size)
    dlogits: Tensor
    dlogits = backend_for(backend, logits).token_stats_bwd(logits, targets, state, upstream, row)
    return dlogits


token_stats_bwd = custom_op("papo::token_stats_bwd", _token_stats_bwd, mutates_args=())


@token_stats_bwd.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    g_unit_polarity: Tensor | None,
    temperature: float,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _token_stats_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, *ctx.options = inputs
    state = output[-1]
    ctx.save_for_backward(logits, targets, state)
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _token_stats_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    refuse_lse(grads[3])
    dlogits = None
    if any(g is not None for g in grads[:3]):
        logits, targets, state = ctx.saved_tensors
        run: Any = _token_stats_bwd if is_plain(logits) else token_stats_bwd
        dlogits = run(logits, targets, state, *grads[:3], *ctx.options)
    return dlogits, None, None, None, None, None


def _token_stats_op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _token_stats_context(ctx, inputs, output)
    # A traced graph asks for the gradient of every output, so lse cannot refuse one there.
    ctx.mark_non_differentiable(*output[3:])


token_stats.register_autograd(_token_stats_backward, setup_context=_token_stats_op_context)


class _TokenStats(torch.autograd.Function):
    """The same autograd without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _token_stats(*inputs)
        _token_stats_context(ctx, inputs, output)
        return output

    backward = staticmethod(_token_stats_backward)


def run_token_stats(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`token_stats`, by the shortest way."""
    if not is_plain(logits):
        return token_stats(logits, *rest)
    if torch.is_grad_enabled() and logits.requires_grad:
        outputs: tuple[Tensor, ...] = _TokenStats.apply(logits, *rest)
        return outputs
    return _token_stats(logits, *rest)
