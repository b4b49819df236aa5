"""The torch operations: schemas, fake implementations and autograd, one of each per operation.

Here the statistics and what all operations share; the losses are in `loss_ops.py`, those of hidden
states in `linear_ops.py`. Nothing else registers with torch. The operations take flattened rows and
resolve the backend when they run, so a compiled graph does not depend on it. Their floats are
constants of a graph: another temperature compiles it again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from papo_kernels.backends import choice as backends
from papo_kernels.backends import extension as _native
from papo_kernels.types import IGNORE_INDEX, STATE_SIZE, RowParams, acc_dtype

ROW_SCHEMA = "float temperature, float softcap, SymInt vocab_size, str backend"


def backend_for(requested: str, logits: Tensor) -> Any:
    return backends.module(backends.choose(requested or None, logits.device, logits.dtype))


def as_rows(logits: Tensor) -> Tensor:
    """`logits` as `[N, V]` with unit column stride, a view where the layout allows."""
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def check_target_values(targets: Tensor, vocab_size: int) -> None:
    """On a CPU a bad target raises before anything runs; GPU kernels guard their reads instead."""
    if not targets.is_cpu:
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


def filled(value: float, dtype: torch.dtype, like: Tensor) -> Tensor:
    """`value` as a 0-dim tensor on the device of `like`, without a host sync; not to be written to:
    eager calls share it."""
    device = like.device
    if not is_plain(like):
        # A sum, unlike full(), leaves the number a variable of a traced graph.
        return torch.zeros((), dtype=dtype, device=device) + value
    if device.type == "cpu":
        return _filled(value, dtype, device, 0)
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        # What another stream fills may not be there yet; and a captured graph outlives the cache.
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        return _filled(value, dtype, device, stream)
    return torch.full((), value, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _filled(value: float, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)


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


@custom_op(
    "papo::scale_",
    mutates_args=("dlogits",),
    schema="(Tensor(a!) dlogits, Tensor factor, str backend) -> ()",
)
def scale_(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    """`dlogits [N, V] *= factor` (0-dim); free where the factor is 1."""
    backend_for(backend, dlogits).scale_(dlogits, factor)


@scale_.register_fake
def _(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    return None


def run_scale_(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    """`scale_`, by the shortest way."""
    if is_plain(dlogits):
        backend_for(backend, dlogits).scale_(dlogits, factor)
    else:
        scale_(dlogits, factor, backend)


# ---- token_stats --------------------------------------------------------------------------------


def _token_stats(
    logits: Tensor, targets: Tensor, row: RowParams, backend: str
) -> tuple[Tensor, ...]:
    check_target_values(targets, row.vocab_size)
    outputs: tuple[Tensor, ...] = backend_for(backend, logits).token_stats_fwd(logits, targets, row)
    return outputs


@custom_op(
    "papo::token_stats",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, {ROW_SCHEMA}) -> (Tensor logp, Tensor entropy, "
    "Tensor unit_polarity, Tensor lse, Tensor state)",
)
def token_stats(logits: Tensor, targets: Tensor, *row_and_backend: Any) -> tuple[Tensor, ...]:
    """logp, entropy, unit_polarity, lse `[N]` and the row state `[N, 6]` that backward needs."""
    *row, backend = row_and_backend
    return _token_stats(logits, targets, RowParams(*row), backend)


@token_stats.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return fake_token_stats(logits)


def fake_token_stats(like: Tensor) -> tuple[Tensor, ...]:
    n, acc = like.shape[0], acc_dtype(like.dtype)
    stats = (like.new_empty(n, dtype=acc) for _ in range(4))
    return *stats, like.new_empty((n, STATE_SIZE), dtype=torch.float64)


@custom_op(
    "papo::token_stats_bwd",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, Tensor state, Tensor? g_logp, Tensor? g_entropy, "
    f"Tensor? g_unit_polarity, {ROW_SCHEMA}) -> Tensor",
)
def token_stats_bwd(logits: Tensor, targets: Tensor, state: Tensor, *rest: Any) -> Tensor:
    """dlogits `[N, V]` for upstream gradients `[N]`, None being zero."""
    *grads, temperature, softcap, vocab_size, backend = rest
    row = RowParams(temperature, softcap, vocab_size)
    dlogits: Tensor = backend_for(backend, logits).token_stats_bwd(
        logits, targets, state, grads, row
    )
    return dlogits


@token_stats_bwd.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _token_stats_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    refuse_lse(grads[3])
    dlogits = None
    if any(g is not None for g in grads[:3]):
        logits, targets, state = ctx.saved_tensors
        rows = as_rows(logits)
        if is_plain(logits):
            backward = backend_for(ctx.backend, logits).token_stats_bwd
            dlogits = backward(rows, targets, state, grads[:3], ctx.row)
        else:
            dlogits = token_stats_bwd(rows, targets, state, *grads[:3], *ctx.row[:3], ctx.backend)
        dlogits = dlogits.view_as(logits)
    return dlogits, *ctx.nothing


def _token_stats_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, *row, ctx.backend = inputs
    ctx.save_for_backward(logits, targets, output[-1])
    ctx.row, ctx.nothing = RowParams(*row), (None,) * (len(inputs) - 1)
    ctx.set_materialize_grads(False)
    # A traced graph asks for the gradient of every output, so lse cannot refuse one here.
    ctx.mark_non_differentiable(*output[3:])


token_stats.register_autograd(_token_stats_backward, setup_context=_token_stats_context)


class _TokenStats(torch.autograd.Function):
    """The same autograd without the dispatcher, for `logits [..., V]`; lse refuses a gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, row: RowParams, backend: str
    ) -> tuple[Tensor, ...]:
        *stats, state = _token_stats(as_rows(logits), targets, row, backend)
        ctx.save_for_backward(logits, targets, state)
        ctx.row, ctx.backend, ctx.nothing = row, backend, (None,) * 3
        ctx.set_materialize_grads(False)
        return tuple(stats)

    backward = staticmethod(_token_stats_backward)


def run_token_stats(
    logits: Tensor, targets: Tensor, row: RowParams, backend: str
) -> tuple[Tensor, ...]:
    """`token_stats` of `logits [..., V]`, by the shortest way: logp, entropy, unit_polarity, lse.

    Args:
        targets: `[N]`.
    """
    if not is_plain(logits):
        return tuple(token_stats(as_rows(logits), targets, *row[:3], backend)[:4])
    if torch.is_grad_enabled() and logits.requires_grad:
        outputs: tuple[Tensor, ...] = _TokenStats.apply(logits, targets, row, backend)
        return outputs
    return _token_stats(as_rows(logits), targets, row, backend)[:4]
