"""Where a kernel takes a row's sums from, and the numbers that the host passes to every kernel."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from papo_kernels import types

from .row_state import LOG2E, POS_INF, Scaling, capped, empty_states, loaded_state, sampled
from .tile import (
    N_SUMS,
    count_segments,
    rest_of_row,
    row_at,
    row_sums,
    row_sums_of_parts,
    segment_states,
    store_states,
)

IGNORED = tl.constexpr(types.IGNORE_INDEX)
ELSEWHERE = tl.constexpr(types.ELSEWHERE)

# Where the state of a row comes from.
LOGITS = tl.constexpr(0)  # this program reads the row
PARTS = tl.constexpr(1)  # segments_kernel has read it, one program per segment
STATE = tl.constexpr(2)  # the caller has it

# Arguments of the kernels for whose values Triton would otherwise compile again.
INTEGERS = ("stride", "dlogits_stride", "vocab_size", "n_columns")


class Numbers(NamedTuple):
    """The numbers of a call that all kernels need, the first three where rows share a
    temperature."""

    inv_temperature: float
    inv_temperature_low: float
    log2_scale: float
    softcap: float
    inv_softcap: float
    elsewhere: float  # logit of a token that lies in another shard: -inf, NaN in whole rows


class Rows(NamedTuple):
    """``[N]``: what says whether a row is read."""

    targets: Tensor
    token_weight: Tensor
    kl_weight: Tensor
    entropy_weight: Tensor


@triton.jit
def scaling(numbers, temperatures, i, how):
    """Of row ``i``; NaN where its own temperature is not a positive number."""
    if how.HAS_TEMPERATURES:
        t = tl.load(temperatures + i)
        t = tl.where((t > 0.0) & (t < POS_INF), t, float("nan"))
        inv_temperature = tl.div_rn(1.0, t)
        inv_temperature_low = tl.fma(-inv_temperature, t, 1.0) * inv_temperature
        log2_scale = inv_temperature * LOG2E
    else:
        inv_temperature = tl.cast(numbers.inv_temperature, tl.float32)
        inv_temperature_low = tl.cast(numbers.inv_temperature_low, tl.float32)
        log2_scale = tl.cast(numbers.log2_scale, tl.float32)
    return Scaling(
        inv_temperature,
        inv_temperature_low,
        log2_scale,
        tl.cast(numbers.softcap, tl.float32),
        tl.cast(numbers.inv_softcap, tl.float32),
        tl.cast(numbers.elsewhere, tl.float32),
    )


@triton.jit
def has_weight(rows, i):
    """Whether any of the loss's terms has a weight at token ``i``."""
    in_policy = tl.load(rows.token_weight + i) != 0.0
    in_kl = tl.load(rows.kl_weight + i) != 0.0
    return in_policy | in_kl | (tl.load(rows.entropy_weight + i) != 0.0)


@triton.jit
def program_row():
    """This program's row, int64. The second grid index is the program's part of the row."""
    return tl.program_id(0).to(tl.int64)


@triton.jit
def target_logit(row, target, vocab_size, s, how):
    """The sampled token's softcapped logit.

    It is -inf where the token lies in another shard. It is NaN, and nothing is read, where the
    target is not a column.
    """
    valid = (target >= 0) & (target < vocab_size)
    z = tl.load(row.ptr + (row.head + tl.where(valid, target, 0)), mask=valid, other=0.0)
    z = z.to(tl.float32)
    if how.HAS_SOFTCAP:
        z = capped(z, s)
    return tl.where(valid, z, tl.where(target == ELSEWHERE, s.elsewhere, float("nan")))


@triton.jit
def parts_stride(n_segments, how):
    """Floats that a row's parts take: its segments' states, then the target's logit."""
    return (n_segments * N_SUMS + 1) * how.LANES


@triton.jit
def whole_row(row, source, i, target, vocab_size, s, how, EVICTION: tl.constexpr):
    """The sums of row ``i`` and its sampled token; ``vocab_size`` 0: nothing is read."""
    if how.SOURCE == STATE:
        return loaded_state(source + i * 6, s)
    elif how.SOURCE == PARTS:
        n_segments = count_segments(vocab_size, row.ptr.dtype.element_ty, how)
        stride = parts_stride(n_segments, how)
        at = source + i * stride
        sums = row_sums_of_parts(at, n_segments, s, how)
        return sums, sampled(tl.load(at + (stride - how.LANES)), sums.z_ref, s)
    else:
        # Where a gradient follows, the logit is loaded before the reductions: past their barriers
        # other warps may overwrite it with the gradient. Elsewhere it is loaded after them, which
        # saves a register in the loop.
        if how.HAS_GRADIENT:
            z = target_logit(row, target, vocab_size, s, how)
        sums = row_sums(row, vocab_size, s, how, EVICTION)
        if not how.HAS_GRADIENT:
            z = target_logit(row, target, vocab_size, s, how)
        return sums, sampled(z, sums.z_ref, s)


@triton.jit(do_not_specialize=["logits", "parts", "temperatures", *INTEGERS])
def segments_kernel(
    logits,
    parts,
    rows,
    has_weights,
    temperatures,
    numbers,
    stride: tl.int64,
    vocab_size,
    how,
):
    """The states of every row's segments, one program per segment, in ``parts``."""
    i, segment = program_row(), tl.program_id(1)
    target = tl.load(rows.targets + i)
    is_read = target != IGNORED
    if has_weights > 0.0:
        is_read = is_read & has_weight(rows, i)
    if is_read:
        s = scaling(numbers, temperatures, i, how)
        row = row_at(logits, i, stride)
        row_stride = parts_stride(tl.num_programs(1), how)
        at = parts + i * row_stride
        lanes = empty_states(how.LANES)
        if segment == 0:
            lanes = rest_of_row(row, vocab_size, s, how)
            z = target_logit(row, target, vocab_size, s, how)
            tl.store(at + (row_stride - how.LANES), z)
        lanes = segment_states(row, vocab_size, segment, lanes, s, how, "evict_first")
        store_states(at + segment * (N_SUMS * how.LANES), lanes, how)
