"""Statistics of every row of the logits: forward (one read) and backward (one read, one write)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from papo_kernels.types import STATE_SIZE, RowParams

from . import launch
from .gradient import fill_zeros, program_part, row_beside, write_gradient
from .row_grad import Upstream, row_grad
from .row_state import finished, store_state
from .source import IGNORED, INTEGERS, STATE, program_row, scaling, whole_row
from .tile import row_at


class StatsOut(NamedTuple):
    """``[N]`` float32, and the state ``[N, 6]`` float64."""

    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    lse: Tensor
    state: Tensor


class StatsGrads(NamedTuple):
    """``[N]``, but for the ``has_*``: 0.0 where a gradient is not given and another stands in."""

    targets: Tensor
    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    lse: Tensor
    has_logp: float
    has_entropy: float
    has_unit_polarity: float
    has_lse: float


# ---- kernels --------------------------------------------------------------------------------


@triton.jit
def store_stats(out, i, r, active):
    tl.store(out.logp + i, tl.where(active, r.logp, 0.0))
    tl.store(out.entropy + i, tl.where(active, r.entropy, 0.0))
    tl.store(out.unit_polarity + i, tl.where(active, r.unit_polarity, 0.0))
    tl.store(out.lse + i, tl.where(active, r.lse, 0.0))


@triton.jit(do_not_specialize=["logits", "source", "targets", "temperatures", *INTEGERS])
def token_stats_kernel(
    logits, source, targets, temperatures, out, numbers, stride: tl.int64, vocab_size, how
):
    i = program_row()
    s = scaling(numbers, temperatures, i, how)
    target = tl.load(targets + i)
    active = target != IGNORED
    row = row_at(logits, i, stride)
    n_columns = tl.where(active, vocab_size, 0)
    sums, token = whole_row(row, source, i, target, n_columns, s, how, "evict_first")
    store_stats(out, i, finished(sums, token), active)
    if how.SOURCE != STATE:
        store_state(out.state + i * 6, sums, token, s, active)


@triton.jit
def upstream_gradient(ptr, i, given):
    return tl.load(ptr + i, mask=given > 0.0, other=0.0)


@triton.jit(do_not_specialize=["logits", "dlogits", "state", "temperatures", *INTEGERS])
def token_stats_bwd_kernel(
    logits,
    dlogits,
    state,
    temperatures,
    grads,
    numbers,
    stride: tl.int64,
    dlogits_stride: tl.int64,
    vocab_size,
    n_columns,
    how,
):
    i, part = program_row(), program_part()
    target = tl.load(grads.targets + i)
    row = row_at(logits, i, stride)
    if target != IGNORED:
        s = scaling(numbers, temperatures, i, how)
        sums, token = whole_row(row, state, i, target, vocab_size, s, how, "")
        g = Upstream(
            upstream_gradient(grads.logp, i, grads.has_logp),
            upstream_gradient(grads.entropy, i, grads.has_entropy),
            upstream_gradient(grads.unit_polarity, i, grads.has_unit_polarity),
            upstream_gradient(grads.lse, i, grads.has_lse),
        )
        grad = row_grad(sums, finished(sums, token), g, token, s, how.HAS_SOFTCAP)
        out = row_beside(dlogits, i, dlogits_stride, row.head)
        column = tl.where(target < vocab_size, target, -1).to(tl.int32)
        write_gradient(row, out, vocab_size, column, part, grad, s, how)
    n_written = tl.where(target != IGNORED, vocab_size, 0)
    if n_written < n_columns:
        fill_zeros(row_at(dlogits, i, dlogits_stride), n_written, n_columns, part, how)


# ---- launchers ------------------------------------------------------------------------------


def token_stats_fwd(
    logits: Tensor, targets: Tensor, row: RowParams, state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `Backend.token_stats_fwd`, in one pass over the rows."""
    call = launch.plan(logits.device, logits.dtype, row)
    n, aligned = logits.shape[0], launch.is_aligned(logits)
    targets, temperatures = launch.row_tensor(targets, torch.int64), launch.temperatures(row)
    logp = logits.new_empty(n, dtype=torch.float32)
    stats = (logp, torch.empty_like(logp), torch.empty_like(logp), torch.empty_like(logp))
    if state is None:
        kind, source = launch.read_rows(call, logits, aligned, targets, temperatures)
        state = logits.new_empty((n, STATE_SIZE), dtype=torch.float64)
    else:
        kind, source = STATE.value, state.contiguous()
    call.run(
        token_stats_kernel,
        launch.Flags(aligned, False, kind, has_temperatures=temperatures is not None),
        None,
        n,
        1,
        logits,
        source,
        targets,
        logits if temperatures is None else temperatures,
        StatsOut(*stats, state),
        call.numbers,
        logits.stride(0),
        row.vocab_size,
    )
    return *stats, state


def token_stats_bwd(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    grads: Sequence[Tensor | None],
    row: RowParams,
    dlogits: Tensor | None = None,
) -> Tensor:
    """As `Backend.token_stats_bwd`."""
    dlogits = logits.new_empty(logits.shape) if dlogits is None else dlogits
    given = [launch.row_tensor(g, torch.float32) for g in grads if g is not None]
    if not given:
        return dlogits.zero_()
    call = launch.plan(logits.device, logits.dtype, row)
    n = logits.shape[0]
    has = [float(g is not None) for g in grads]
    rest = iter(given)
    upstream = [next(rest) if is_given else given[0] for is_given in has]
    same_words = dlogits is logits or launch.same_words(logits, dlogits)
    temperatures = launch.temperatures(row)
    has_squares, has_temperatures = grads[2] is not None, temperatures is not None
    call.run(
        token_stats_bwd_kernel,
        launch.Flags(False, same_words, STATE.value, False, has_squares, has_temperatures),
        dlogits.dtype,
        n,
        call.count_parts(n),
        logits,
        dlogits,
        state.contiguous(),
        logits if temperatures is None else temperatures,
        StatsGrads(launch.row_tensor(targets, torch.int64), *upstream, *has),
        call.numbers,
        logits.stride(0),
        dlogits.stride(0),
        row.vocab_size,
        logits.shape[1],
    )
    return dlogits
