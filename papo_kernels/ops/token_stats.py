"""Statistics of logits as torch operations, and their autograd.

The operations take flattened rows and resolve the backend when they run, so that a compiled graph
does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from papo_kernels.backends import several
from papo_kernels.backends.targets import check_target_values
from papo_kernels.dispatch import kernel_or_operation
from papo_kernels.types import IGNORE_INDEX, STATE_SIZE, RowParams, acc_dtype

from .common import as_rows, backend_for, refuse_double_backward
from .schema import ROW_SCHEMA, flattened_row, unflattened_row


def _kernel(logits: Tensor, targets: Tensor, row: RowParams, backend: str) -> tuple[Tensor, ...]:
    check_target_values(targets, row.vocab_size)
    return several.token_stats_fwd(backend_for(backend, logits), logits, targets, row)


@custom_op(
    "papo::token_stats",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, {ROW_SCHEMA}) -> (Tensor logp, Tensor entropy, "
    "Tensor unit_polarity, Tensor lse, Tensor state)",
)
def token_stats(logits: Tensor, targets: Tensor, *row_and_backend: Any) -> tuple[Tensor, ...]:
    """logp, entropy, unit_polarity, lse and the row state that backward needs, as
    `several.token_stats_fwd` for `targets [N]` or `[N, k]`."""
    return _kernel(logits, targets, *unflattened_row(row_and_backend))


@token_stats.register_fake
def _(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return fake_token_stats(logits, targets)


def fake_token_stats(like: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    n, acc = like.shape[0], acc_dtype(like.dtype)
    state_size = STATE_SIZE + (targets.shape[1] if targets.dim() == 2 else 0)
    shapes = (targets.shape, (n,), targets.shape, (n,))
    stats = (like.new_empty(shape, dtype=acc) for shape in shapes)
    return *stats, like.new_empty((n, state_size), dtype=torch.float64)


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
    return several.token_stats_bwd(backend_for(backend, logits), logits, targets, state, grads, row)


@custom_op(
    "papo::token_stats_bwd",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, Tensor state, Tensor? g_logp, Tensor? g_entropy, "
    f"Tensor? g_unit_polarity, Tensor? g_lse, {ROW_SCHEMA}) -> Tensor",
)
def token_stats_bwd(logits: Tensor, targets: Tensor, state: Tensor, *rest: Any) -> Tensor:
    """dlogits `[N, V]` for upstream gradients, None being zero."""
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
    """logp, entropy, unit_polarity and lse of `logits [..., V]`, and if `full` the row state."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, row: RowParams, backend: str, full: bool
    ) -> tuple[Tensor, ...]:
        run = kernel_or_operation((logits,), _kernel, _operation)
        outputs = run(as_rows(logits), targets, row, backend)
        # The temperatures too: autograd then sees whether they were overwritten.
        ctx.save_for_backward(logits, targets, outputs[4], row.temperatures)
        ctx.row, ctx.backend = row, backend
        ctx.set_materialize_grads(False)
        if full:
            ctx.mark_non_differentiable(outputs[4])
        return outputs if full else outputs[:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        dlogits, grads = None, grads[:4]
        if any(g is not None for g in grads):
            logits, targets, state, _ = ctx.saved_tensors
            run = kernel_or_operation((logits, *grads), _kernel_bwd, _operation_bwd)
            rows = as_rows(logits)
            dlogits = run(rows, targets, state, grads, ctx.row, ctx.backend).view_as(logits)
        return dlogits, None, None, None, None


def run_token_stats(
    logits: Tensor, targets: Tensor, row: RowParams, backend: str, full: bool = False
) -> tuple[Tensor, ...]:
    """logp, entropy, unit_polarity and lse of `logits [..., V]`, and if `full` the row state, as
    `several.token_stats_fwd` for `targets [N]` or `[N, k]`."""
    if torch.is_grad_enabled() and logits.requires_grad:
        outputs: tuple[Tensor, ...] = _TokenStats.apply(logits, targets, row, backend, full)
        return outputs
    run = kernel_or_operation((logits,), _kernel, _operation)
    return run(as_rows(logits), targets, row, backend)[: 5 if full else 4]


# ---- the sums of rows ----------------------------------------------------------------------------


@custom_op(
    "papo::logit_sums", mutates_args=(), schema=f"(Tensor logits, {ROW_SCHEMA}) -> Tensor sums"
)
def logit_sums(logits: Tensor, *row_and_backend: Any) -> Tensor:
    """The sum of u over the columns that count, `[N]` float64."""
    return several.logit_sums(logits, unflattened_row(row_and_backend)[0])


@logit_sums.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float64)


def _logit_sums_operation(logits: Tensor, row: RowParams) -> Tensor:
    sums: Tensor = logit_sums(logits, *flattened_row(row, ""))
    return sums


def run_logit_sums(logits: Tensor, row: RowParams) -> Tensor:
    """The sum of u over the columns that count, `[N]` float64, without gradient."""
    run = kernel_or_operation((logits,), several.logit_sums, _logit_sums_operation)
    return run(as_rows(logits.detach()), row)


def full_stats(outputs: Sequence[Tensor], targets: Tensor, vocab_size: int) -> tuple[Tensor, ...]:
    """The fields of `FullTokenStats` from those of `TokenStats`, the state and the sums of rows."""
    *stats, state, sums = outputs
    row_max, Z, Z2 = state[:, 0], state[:, 1], state[:, 3]
    u, peak = state[:, STATE_SIZE - 1], row_max
    ignored = of_row = targets == IGNORE_INDEX
    if targets.dim() == 2:
        u, peak, of_row = state[:, STATE_SIZE:], row_max[:, None], ignored.all(dim=1)
    log_sum_sq_probs = Z2.log() - 2.0 * Z.log()
    # A row without a distribution has no mean either.
    mean = torch.where(Z > 0, sums / vocab_size, torch.nan)
    dtype = stats[1].dtype
    return (
        *stats,
        log_sum_sq_probs.masked_fill(of_row, 0.0).to(dtype),
        mean.masked_fill(of_row, 0.0).to(dtype),
        (u == peak) & (Z > 0).view(peak.shape) & ~ignored,
    )
