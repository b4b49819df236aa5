"""Statistics of logits as torch operations, and their autograd.

The operations take flattened rows and resolve the backend when they run, so that a compiled graph
does not depend on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from papo_kernels.backends.targets import check_target_values
from papo_kernels.dispatch import kernel_or_operation
from papo_kernels.types import STATE_SIZE, RowParams, acc_dtype

from .common import as_rows, backend_for, refuse_double_backward
from .schema import ROW_SCHEMA, flattened_row, unflattened_row


def _kernel(logits: Tensor, targets: Tensor, row: RowParams, backend: str) -> tuple[Tensor, ...]:
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
    return _kernel(logits, targets, *unflattened_row(row_and_backend))


@token_stats.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return fake_token_stats(logits)


def fake_token_stats(like: Tensor) -> tuple[Tensor, ...]:
    n, acc = like.shape[0], acc_dtype(like.dtype)
    stats = (like.new_empty(n, dtype=acc) for _ in range(4))
    return *stats, like.new_empty((n, STATE_SIZE), dtype=torch.float64)


def _operation(logits: Tensor, targets: Tensor, row: RowParams, backend: str) -> tuple[Tensor, ...]:
    return tuple(token_stats(logits, targets, *flattened_row(row, backend)))


def _kernel_bwd(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    grads: tuple[Tensor | None, ...],
    row: RowParams,
    backend: str,
) -> Tensor:
    dlogits: Tensor = backend_for(backend, logits).token_stats_bwd(
        logits, targets, state, grads, row
    )
    return dlogits


@custom_op(
    "papo::token_stats_bwd",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, Tensor state, Tensor? g_logp, Tensor? g_entropy, "
    f"Tensor? g_unit_polarity, Tensor? g_lse, {ROW_SCHEMA}) -> Tensor",
)
def token_stats_bwd(logits: Tensor, targets: Tensor, state: Tensor, *rest: Any) -> Tensor:
    """dlogits `[N, V]` for upstream gradients `[N]`, None being zero."""
    row, backend = unflattened_row(rest[4:])
    return _kernel_bwd(logits, targets, state, rest[:4], row, backend)


@token_stats_bwd.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _operation_bwd(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    grads: tuple[Tensor | None, ...],
    row: RowParams,
    backend: str,
) -> Tensor:
    rest = flattened_row(row, backend)
    dlogits: Tensor = token_stats_bwd(logits, targets, state, *grads, *rest)
    return dlogits


class _TokenStats(torch.autograd.Function):
    """logp, entropy, unit_polarity and lse `[N]` of `logits [..., V]`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, row: RowParams, backend: str
    ) -> tuple[Tensor, ...]:
        run = kernel_or_operation((logits,), _kernel, _operation)
        *stats, state = run(as_rows(logits), targets, row, backend)
        # The temperatures too: autograd then sees whether they were overwritten.
        ctx.save_for_backward(logits, targets, state, row.temperatures)
        ctx.row, ctx.backend = row, backend
        ctx.set_materialize_grads(False)
        return tuple(stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        dlogits = None
        if any(g is not None for g in grads):
            logits, targets, state, _ = ctx.saved_tensors
            run = kernel_or_operation((logits,), _kernel_bwd, _operation_bwd)
            rows = as_rows(logits)
            dlogits = run(rows, targets, state, grads, ctx.row, ctx.backend).view_as(logits)
        return dlogits, None, None, None


def run_token_stats(
    logits: Tensor, targets: Tensor, row: RowParams, backend: str
) -> tuple[Tensor, ...]:
    """logp, entropy, unit_polarity and lse `[N]` of `logits [..., V]` and `targets [N]`."""
    if torch.is_grad_enabled() and logits.requires_grad:
        outputs: tuple[Tensor, ...] = _TokenStats.apply(logits, targets, row, backend)
        return outputs
    run = kernel_or_operation((logits,), _kernel, _operation)
    return run(as_rows(logits), targets, row, backend)[:4]
