"""The policy loss with its gradient: a row's statistics, its token's objective, its dlogits.

One program reads a row, forms the objective and walks the row again from its end, most of which the
L2 cache still holds. Where rows are few, a first launch reads them in segments. In a second one,
one program per segment finishes its row from all the segments' states and writes its part of the
gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from papo_kernels.objective import Objective
from papo_kernels.types import RowParams, TokenInputs, WeightingInputs

from . import launch
from .gradient import Part, fill_zeros, program_part, row_beside, scale_part, write_gradient
from .policy_loss import INSIDE, policy_token
from .row_grad import Upstream, row_grad
from .row_state import HIGHEST, finished, saturated
from .source import (
    IGNORED,
    INTEGERS,
    LOGITS,
    STATE,
    Numbers,
    Rows,
    has_weight,
    program_row,
    scaling,
    whole_row,
)
from .tile import row_at


class Inputs(NamedTuple):
    """``[N]``, but for the 0-dim phase, sigma and scale; any float32 in place of what is absent."""

    rows: Rows
    advantages: Tensor
    old: Tensor  # old_logp, or the log of the ratio
    ref_logp: Tensor
    phase: Tensor
    sigma: Tensor
    scale: Tensor


class LossNumbers(NamedTuple):
    """The call's numbers, those of `Objective.numbers`, and ``has_*`` and ``is_*``, 0.0 or 1.0."""

    numbers: Numbers
    clip_low: float
    clip_high: float
    negative_low: float
    negative_high: float
    dual_clip: float
    log_ratio_limit: float
    ratio_cap: float
    kl_limit: float
    sapo_positive: float
    sapo_other: float
    gppo_low: float
    gppo_high: float
    kl_coef: float
    entropy_coef: float
    has_old: float
    has_log_ratio: float
    has_weighting: float
    is_tanh: float
    strength: float
    dead_zone: float


class LossOut(NamedTuple):
    """``[N]`` float32, ``clip_side`` uint8."""

    token_loss: Tensor
    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    polarity: Tensor
    weight: Tensor
    ratio: Tensor
    clip_side: Tensor


class Token(NamedTuple):
    """One token's inputs; of those of the KL term the addresses, as few losses have one."""

    advantage: tl.tensor
    token_weight: tl.tensor
    kl_weight_at: tl.tensor
    entropy_weight: tl.tensor
    old: tl.tensor
    ref_logp_at: tl.tensor
    phase: tl.tensor
    sigma: tl.tensor
    scale: tl.tensor


# ---- kernels --------------------------------------------------------------------------------


@triton.jit
def load_token(inputs, i):
    return Token(
        tl.load(inputs.advantages + i),
        tl.load(inputs.rows.token_weight + i),
        inputs.rows.kl_weight + i,
        tl.load(inputs.rows.entropy_weight + i),
        tl.load(inputs.old + i),
        inputs.ref_logp + i,
        tl.load(inputs.phase),
        tl.load(inputs.sigma),
        tl.load(inputs.scale),
    )


@triton.jit
def store_token(out, i, r, token, active):
    tl.store(out.token_loss + i, tl.where(active, token.loss, 0.0))
    tl.store(out.logp + i, tl.where(active, r.logp, 0.0))
    tl.store(out.entropy + i, tl.where(active, r.entropy, 0.0))
    tl.store(out.unit_polarity + i, tl.where(active, r.unit_polarity, 0.0))
    tl.store(out.polarity + i, tl.where(active, token.polarity, 0.0))
    tl.store(out.weight + i, tl.where(active, token.weight, 0.0))
    tl.store(out.ratio + i, tl.where(active, token.ratio, 0.0))
    tl.store(out.clip_side + i, tl.where(active, token.clip_side, INSIDE).to(tl.uint8))


@triton.jit(do_not_specialize=["logits", "dlogits", "source", "temperatures", *INTEGERS])
def policy_loss_kernel(
    logits,
    dlogits,
    source,
    temperatures,
    inputs,
    out,
    objective,
    stride: tl.int64,
    dlogits_stride: tl.int64,
    vocab_size,
    n_columns,
    how,
):
    i, part = program_row(), program_part()
    s = scaling(objective.numbers, temperatures, i, how)
    target = tl.load(inputs.rows.targets + i)
    active = (target != IGNORED) & has_weight(inputs.rows, i)
    n_read = tl.where(active, vocab_size, 0)
    row = row_at(logits, i, stride)
    sums, sample = whole_row(row, source, i, target, n_read, s, how, "")
    r = finished(sums, sample)
    token = policy_token(r, load_token(inputs, i), objective, how)
    if part.index == 0:
        store_token(out, i, r, token, active)
    if how.HAS_GRADIENT:
        if active:
            g = Upstream(token.dlogp, token.dentropy, 0.0, 0.0)
            grad = row_grad(sums, r, g, sample, s, how.HAS_SOFTCAP)
            beside = row_beside(dlogits, i, dlogits_stride, row.head)
            column = tl.where(target < vocab_size, target, -1).to(tl.int32)
            write_gradient(row, beside, vocab_size, column, part, grad, s, how)
        if n_read < n_columns:
            fill_zeros(row_at(dlogits, i, dlogits_stride), n_read, n_columns, part, how)


@triton.jit(do_not_specialize=["dlogits", "factor", "n_rows", *INTEGERS])
def scale_kernel(dlogits, factor, n_rows, n_columns, stride: tl.int64, how):
    """Programs take segments of rows in turn, and none where the factor is 1. An element may be
    infinite where the factor is 0, and 0 where the factor is infinite."""
    WORD: tl.constexpr = 128 // dlogits.dtype.element_ty.primitive_bitwidth
    f = saturated(tl.load(factor), HIGHEST)
    if f != 1.0:
        per_row = tl.cdiv(n_columns, how.LANES * how.VECTORS * how.SEGMENT_TILES * WORD)
        n_segments = n_rows.to(tl.int64) * per_row
        segment = tl.program_id(0).to(tl.int64)
        while segment < n_segments:
            row = row_at(dlogits, segment // per_row, stride)
            part = Part((segment % per_row).to(tl.int32), per_row)
            if f == 0.0:
                fill_zeros(row, 0, n_columns, part, how)
            else:
                scale_part(row, n_columns, part, f, how)
            segment += tl.num_programs(0)


# ---- launchers ------------------------------------------------------------------------------


def policy_loss_fwd(
    logits: Tensor,
    targets: Tensor,
    tokens: TokenInputs,
    objective: Objective,
    weighting: WeightingInputs | None,
    row: RowParams,
    dlogits: Tensor | None,
    state: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As `Backend.policy_loss_fwd`."""
    call = launch.plan(logits.device, logits.dtype, row)
    n, aligned = logits.shape[0], launch.is_aligned(logits)
    inputs = _inputs(targets, tokens, weighting)
    loss = logits.new_empty(n, dtype=torch.float32)
    rest = [torch.empty_like(loss) for _ in range(6)]
    out = LossOut(loss, *rest, logits.new_empty(n, dtype=torch.uint8))
    temperatures = launch.temperatures(row)
    if state is None:
        kind, source = launch.read_rows(call, logits, aligned, inputs.rows, temperatures)
    else:
        kind, source = STATE.value, state.contiguous()
    written = logits if dlogits is None else dlogits
    same_words = written is logits or launch.same_words(logits, written)
    split = dlogits is not None and kind != LOGITS.value
    mode, numbers = _objective(
        call.numbers,
        objective,
        weighting and (weighting.strength, weighting.shape, weighting.dead_zone),
        tokens.old_logp is not None,
        tokens.log_ratio is not None,
        tokens.ref_logp is not None,
    )
    flags = (aligned and state is None, same_words, kind, dlogits is not None, False)
    call.run(
        policy_loss_kernel,
        launch.Flags(*flags, temperatures is not None, *mode),
        written.dtype,
        n,
        call.count_parts(n) if split else 1,
        logits,
        written,
        source,
        logits if temperatures is None else temperatures,
        inputs,
        out,
        numbers,
        logits.stride(0),
        written.stride(0),
        row.vocab_size,
        logits.shape[1],
    )
    return tuple(out)


def _inputs(targets: Tensor, tokens: TokenInputs, weighting: WeightingInputs | None) -> Inputs:
    f32, rows = torch.float32, launch.row_tensor
    advantages = rows(tokens.advantages, f32)
    phase = sigma = scale = old = ref_logp = advantages
    kl_weight = entropy_weight = token_weight = rows(tokens.token_weight, f32)
    if tokens.old_logp is not None:
        old = rows(tokens.old_logp, f32)
    if tokens.log_ratio is not None:
        old = rows(tokens.log_ratio, f32)
    if tokens.kl_weight is not None:
        kl_weight = rows(tokens.kl_weight, f32)
    if tokens.entropy_weight is not None:
        entropy_weight = rows(tokens.entropy_weight, f32)
    if tokens.ref_logp is not None:
        ref_logp = rows(tokens.ref_logp, f32)
    if weighting is not None:
        phase, sigma = rows(weighting.phase, f32), rows(weighting.sigma, f32)
        scale = rows(weighting.scale, f32)
    return Inputs(
        Rows(rows(targets, torch.int64), token_weight, kl_weight, entropy_weight),
        advantages,
        old,
        ref_logp,
        phase,
        sigma,
        scale,
    )


@lru_cache(maxsize=256)
def _objective(
    numbers: Numbers,
    objective: Objective,
    weighting: tuple[float, str, float] | None,
    has_old: bool,
    has_log_ratio: bool,
    has_ref: bool,
) -> tuple[tuple[str, str, bool, bool], LossNumbers]:
    """What a kernel is compiled for, the last fields of `launch.Flags`, and what it is given.

    Args:
        weighting: its strength, shape and dead zone.
    """
    strength, shape, dead_zone = weighting or (0.0, "", 0.0)
    has = (has_old, has_log_ratio, weighting is not None, shape == "tanh")
    values = map(float, (*objective.numbers(), *has, strength, dead_zone))
    given = LossNumbers(numbers, *values)
    if not has_ref:
        given = given._replace(kl_coef=0.0)
    estimator, slope_of_k2 = objective.kl_value, objective.kl_slope_of_k2
    return (objective.surrogate, estimator, slope_of_k2, objective.kl_ratio), given


def scale_(dlogits: Tensor, factor: Tensor) -> None:
    """As `Backend.scale_`."""
    n, n_columns = dlogits.shape
    call = launch.plan(dlogits.device, dlogits.dtype, RowParams(1.0, 0.0, n_columns))
    factor = launch.row_tensor(factor, torch.float32)
    # Few enough to cost little where the factor is 1, which only the device knows.
    programs = min(n * n_columns, 16 * launch.count_multiprocessors(dlogits.device))
    stride = dlogits.stride(0)
    call.run(scale_kernel, launch.Flags(), None, programs, 1, dlogits, factor, n, n_columns, stride)
