"""The policy loss with its gradient: a row's statistics, its token's objective, its dlogits.

One program reads a row, forms the objective and walks the row again from its end, most of which the
L2 cache still holds. Where rows are few a launch reads them in segments and a second one, a program
a segment, finishes every row anew from its segments' states and writes its part of the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from papo_kernels.checks import HALVES, check_dlogits
from papo_kernels.types import PolicyLossParams, RowParams, TokenInputs, WeightingInputs

from . import launch
from .gradient import Part, fill_zeros, row_beside, scale_part, write_gradient
from .policy_loss import policy_token
from .row_state import Upstream, finished, row_grad
from .source import IGNORED, STATE, Numbers, program_row, scaling, whole, whole_row
from .tile import SEGMENT_TILES, row_at


class Inputs(NamedTuple):
    """``[N]``, but for the 0-dim phase, sigma and scale; any float32 in place of what is absent."""

    targets: Tensor
    advantages: Tensor
    token_weight: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    phase: Tensor
    sigma: Tensor
    scale: Tensor


class Objective(NamedTuple):
    """The call's and the objective's numbers; ``has_*`` and ``is_*`` are 0.0 or 1.0, ``dual_clip``
    0.0 is off."""

    numbers: Numbers
    clip_low: float
    clip_high: float
    dual_clip: float
    kl_coef: float
    entropy_coef: float
    has_old: float
    has_weighting: float
    is_tanh: float
    strength: float
    dead_zone: float


class LossOut(NamedTuple):
    """``[N]`` float32, ``clipped`` bool."""

    token_loss: Tensor
    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    polarity: Tensor
    weight: Tensor
    ratio: Tensor
    clipped: Tensor


class Token(NamedTuple):
    """One token's inputs."""

    advantage: tl.tensor
    token_weight: tl.tensor
    old_logp: tl.tensor
    ref_logp: tl.tensor
    phase: tl.tensor
    sigma: tl.tensor
    scale: tl.tensor


# ---- kernels --------------------------------------------------------------------------------


@triton.jit
def load_token(inputs, i):
    return Token(
        tl.load(inputs.advantages + i),
        tl.load(inputs.token_weight + i),
        tl.load(inputs.old_logp + i),
        tl.load(inputs.ref_logp + i),
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
    tl.store(out.clipped + i, active & token.clipped)


@triton.jit(do_not_specialize=["logits", "dlogits", "source", "stride", "dlogits_stride"])
def policy_loss_kernel(
    logits, dlogits, source, inputs, out, objective, stride, dlogits_stride, how
):
    WORD: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    numbers = objective.numbers
    n_parts = whole(numbers.n_parts)
    i, index = program_row(n_parts)
    s = scaling(numbers)
    target = tl.load(inputs.targets + i)
    active = (target != IGNORED) & (tl.load(inputs.token_weight + i) != 0.0)
    vocab_size = tl.where(active, whole(numbers.vocab_size), 0)
    row = row_at(logits, i, stride)
    state, target_u = whole_row(row, source, i, target, vocab_size, s, how, "")
    r = finished(state, target_u)
    token = policy_token(r, load_token(inputs, i), objective)
    if index == 0:
        store_token(out, i, r, token, active)
    if how.HAS_GRADIENT:
        part = Part(index, n_parts)
        if active:
            g = Upstream(token.dlogp, token.dentropy, 0.0)
            grad = row_grad(state, r, g, target_u, s, how.HAS_SOFTCAP)
            beside = row_beside(dlogits, i, dlogits_stride, row.head, WORD, how)
            column = tl.where(target < vocab_size, target, -1).to(tl.int32)
            write_gradient(row, beside, vocab_size, column, part, grad, s, how)
        n_columns = whole(numbers.n_columns)
        fill_zeros(row_at(dlogits, i, dlogits_stride), vocab_size, n_columns, part, how)


@triton.jit(do_not_specialize=["dlogits", "factor", "n_rows", "n_columns", "stride"])
def scale_kernel(dlogits, factor, n_rows, n_columns, stride, how):
    """Programs take segments of rows in turn, and none where the factor is 1."""
    WORD: tl.constexpr = 128 // dlogits.dtype.element_ty.primitive_bitwidth
    f = tl.load(factor)
    if f != 1.0:
        per_row = tl.cdiv(n_columns, how.LANES * how.VECTORS * SEGMENT_TILES * WORD)
        n_segments = n_rows.to(tl.int64) * per_row
        segment = tl.program_id(0).to(tl.int64)
        while segment < n_segments:
            row = row_at(dlogits, segment // per_row, stride)
            part = Part((segment % per_row).to(tl.int32), per_row)
            scale_part(row, n_columns, part, f, how)
            segment += tl.num_programs(0)


# ---- launchers ------------------------------------------------------------------------------


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
    if dlogits is not None:
        check_dlogits(logits, dlogits, HALVES)
    call = launch.prepare(logits, row)
    n = logits.shape[0]
    outputs = [logits.new_empty(n, dtype=torch.float32) for _ in range(7)]
    out = LossOut(*outputs, logits.new_empty(n, dtype=torch.bool))
    inputs = _inputs(targets, tokens, weighting)
    if state is None:
        kind, source = launch.read_rows(call, inputs.targets, inputs.token_weight)
    else:
        kind, source = STATE.value, state.contiguous()
    split = dlogits is not None and (state is not None or source is not logits)
    n_parts = launch.count_parts(call) if split else 1
    written = logits if dlogits is None else dlogits
    call.run(
        policy_loss_kernel,
        n_parts,
        logits,
        written,
        source,
        inputs,
        out,
        _objective(call.numbers(n_parts), tokens, params, weighting),
        logits.stride(0),
        written.stride(0),
        call.variant(
            ALIGNED=call.aligned and state is None,
            SAME_WORDS=launch.same_words(logits, written),
            HAS_GRADIENT=dlogits is not None,
            SOURCE=kind,
        ),
    )
    return tuple(out)


def _inputs(targets: Tensor, tokens: TokenInputs, weighting: WeightingInputs | None) -> Inputs:
    advantages = launch.row_tensor(tokens.advantages, torch.float32)

    def rows(values: Tensor | None) -> Tensor:
        return advantages if values is None else launch.row_tensor(values, torch.float32)

    given = (
        (None,) * 3 if weighting is None else (weighting.phase, weighting.sigma, weighting.scale)
    )
    return Inputs(
        launch.row_tensor(targets, torch.int64),
        advantages,
        rows(tokens.token_weight),
        rows(tokens.old_logp),
        rows(tokens.ref_logp),
        *map(rows, given),
    )


def _objective(
    numbers: Numbers,
    tokens: TokenInputs,
    params: PolicyLossParams,
    weighting: WeightingInputs | None,
) -> Objective:
    return Objective(
        numbers,
        params.clip_low,
        params.clip_high,
        params.dual_clip or 0.0,
        params.kl_coef if tokens.ref_logp is not None else 0.0,
        params.entropy_coef,
        float(tokens.old_logp is not None),
        float(weighting is not None),
        float(weighting is not None and weighting.shape == "tanh"),
        0.0 if weighting is None else weighting.strength,
        0.0 if weighting is None else weighting.dead_zone,
    )


def scale_(dlogits: Tensor, factor: Tensor) -> None:
    """``dlogits *= factor`` for a 0-dim ``factor``; nothing is touched where it is 1."""
    n, n_columns = dlogits.shape
    factor = launch.row_tensor(factor, torch.float32)
    how = launch.variant(launch.LONG_ROW)
    programs = launch.scaling_programs(dlogits)
    device, stride = dlogits.device, dlogits.stride(0)
    launch.launch(scale_kernel, device, programs, dlogits, factor, n, n_columns, stride, how)
