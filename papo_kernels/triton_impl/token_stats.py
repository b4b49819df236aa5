"""Statistics of every row of the logits: forward (one read) and backward (one read, one write)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from papo_kernels.checks import HALVES, check_dlogits
from papo_kernels.types import STATE_SIZE, RowParams

from . import launch
from .gradient import Part, fill_zeros, row_beside, write_gradient
from .row_state import Upstream, finished, row_grad
from .source import IGNORED, STATE, program_row, scaling, whole, whole_row
from .tile import row_at


class StatsOut(NamedTuple):
    """``[N]`` float32, and the state ``[N, 6]`` float64."""

    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    lse: Tensor
    state: Tensor


class StatsGrads(NamedTuple):
    """Targets, upstream gradients ``[N]``, and 0.0 in place of those that are not given."""

    targets: Tensor
    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    has_logp: float
    has_entropy: float
    has_unit_polarity: float


# ---- kernels --------------------------------------------------------------------------------


@triton.jit
def store_stats(out, i, r, active):
    tl.store(out.logp + i, tl.where(active, r.logp, 0.0))
    tl.store(out.entropy + i, tl.where(active, r.entropy, 0.0))
    tl.store(out.unit_polarity + i, tl.where(active, r.unit_polarity, 0.0))
    tl.store(out.lse + i, tl.where(active, r.lse, 0.0))


@triton.jit
def store_state(out, i, state, target_u, active):
    at = out.state + i * 6
    tl.store(at, tl.where(active, state.row_max, 0.0))
    tl.store(at + 1, tl.where(active, state.Z, 0.0))
    tl.store(at + 2, tl.where(active, state.T, 0.0))
    tl.store(at + 3, tl.where(active, state.Z2, 0.0))
    tl.store(at + 4, tl.where(active, state.T2, 0.0))
    tl.store(at + 5, tl.where(active, target_u, 0.0))


@triton.jit(do_not_specialize=["logits", "source", "targets", "stride"])
def token_stats_kernel(logits, source, targets, out, numbers, stride, how):
    i, _ = program_row(1)
    s = scaling(numbers)
    target = tl.load(targets + i)
    active = target != IGNORED
    vocab_size = tl.where(active, whole(numbers.vocab_size), 0)
    row = row_at(logits, i, stride)
    state, target_u = whole_row(row, source, i, target, vocab_size, s, how, "evict_first")
    store_stats(out, i, finished(state, target_u), active)
    if how.SOURCE != STATE:
        store_state(out, i, state, target_u, active)


@triton.jit
def upstream_gradient(ptr, i, given):
    return tl.load(ptr + i, mask=given > 0.0, other=0.0)


@triton.jit(do_not_specialize=["logits", "dlogits", "state", "stride", "dlogits_stride"])
def token_stats_bwd_kernel(logits, dlogits, state, grads, numbers, stride, dlogits_stride, how):
    WORD: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    n_parts = whole(numbers.n_parts)
    i, index = program_row(n_parts)
    part = Part(index, n_parts)
    n_columns = whole(numbers.n_columns)
    target = tl.load(grads.targets + i)
    row = row_at(logits, i, stride)
    if target != IGNORED:
        s = scaling(numbers)
        vocab_size = whole(numbers.vocab_size)
        row_sums, target_u = whole_row(row, state, i, target, vocab_size, s, how, "")
        g = Upstream(
            upstream_gradient(grads.logp, i, grads.has_logp),
            upstream_gradient(grads.entropy, i, grads.has_entropy),
            upstream_gradient(grads.unit_polarity, i, grads.has_unit_polarity),
        )
        grad = row_grad(row_sums, finished(row_sums, target_u), g, target_u, s, how.HAS_SOFTCAP)
        out = row_beside(dlogits, i, dlogits_stride, row.head, WORD, how)
        column = tl.where(target < vocab_size, target, -1).to(tl.int32)
        write_gradient(row, out, vocab_size, column, part, grad, s, how)
        fill_zeros(row_at(dlogits, i, dlogits_stride), vocab_size, n_columns, part, how)
    else:
        fill_zeros(row_at(dlogits, i, dlogits_stride), 0, n_columns, part, how)


# ---- launchers ------------------------------------------------------------------------------


def token_stats_fwd(
    logits: Tensor, targets: Tensor, row: RowParams, state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of every row in one pass, or finished from ``state``: see ``reference.py``."""
    call = launch.prepare(logits, row)
    n = logits.shape[0]
    outputs = [logits.new_empty(n, dtype=torch.float32) for _ in range(4)]
    targets = launch.row_tensor(targets, torch.int64)
    if state is None:
        kind, source = launch.read_rows(call, targets, None)
        state = logits.new_empty((n, STATE_SIZE), dtype=torch.float64)
    else:
        kind, source = STATE.value, state.contiguous()
    out = StatsOut(*outputs, state)
    call.run(
        token_stats_kernel,
        1,
        logits,
        source,
        targets,
        out,
        call.numbers(1),
        logits.stride(0),
        call.variant(ALIGNED=call.aligned, SOURCE=kind),
    )
    return tuple(out)


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
    dlogits = logits.new_empty(logits.shape) if dlogits is None else dlogits
    check_dlogits(logits, dlogits, HALVES)
    given = [launch.row_tensor(g, torch.float32) for g in grads if g is not None]
    if not given:
        return dlogits.zero_()
    call = launch.prepare(logits, row)
    n_parts = launch.count_parts(call)
    has = [float(g is not None) for g in grads]
    rest = iter(given)
    upstream = [next(rest) if is_given else given[0] for is_given in has]
    call.run(
        token_stats_bwd_kernel,
        n_parts,
        logits,
        dlogits,
        state.contiguous(),
        StatsGrads(launch.row_tensor(targets, torch.int64), *upstream, *has),
        call.numbers(n_parts),
        logits.stride(0),
        dlogits.stride(0),
        call.variant(
            SOURCE=STATE.value,
            SAME_WORDS=launch.same_words(logits, dlogits),
            HAS_SQUARES=grads[2] is not None,
        ),
    )
    return dlogits
