"""Where a kernel takes a row's sums from, and the numbers that the host passes to every kernel."""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_state import Scaling, capped, empty_states, loaded_state, sampled
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

IGNORED = tl.constexpr(-100)
ELSEWHERE = tl.constexpr(-1)

# Where the state of a row comes from.
LOGITS = tl.constexpr(0)  # this program reads the row
PARTS = tl.constexpr(1)  # segments_kernel has read it, a program a segment
STATE = tl.constexpr(2)  # the caller has it

# Arguments of the kernels that Triton would else compile anew for.
INTEGERS = ("stride", "dlogits_stride", "vocab_size", "n_columns")


class Numbers(NamedTuple):
    """The numbers of a call that all kernels need."""

    inv_temperature: float
    log2_scale: float
    softcap: float
    elsewhere: float  # logit of a token that lies in another shard: -inf, NaN in whole rows


@triton.jit
def scaling(numbers):
    return Scaling(
        tl.cast(numbers.inv_temperature, tl.float32),
        tl.cast(numbers.log2_scale, tl.float32),
        tl.cast(numbers.softcap, tl.float32),
        tl.cast(numbers.elsewhere, tl.float32),
    )


@triton.jit
def program_row():
    """This program's row, int64. Its part of it is the second index."""
    return tl.program_id(0).to(tl.int64)


@triton.jit
def target_logit(row, target, vocab_size, s, how):
    """The sampled token's softcapped logit: -inf where that lies in another shard, NaN, and no
    read, where the target is no column."""
    valid = (target >= 0) & (target < vocab_size)
    z = tl.load(row.ptr + (row.head + tl.where(valid, target, 0)), mask=valid, other=0.0)
    z = z.to(tl.float32)
    if how.HAS_SOFTCAP:
        z = capped(z, s.softcap)
    return tl.where(valid, z, tl.where(target == ELSEWHERE, s.elsewhere, float("nan")))


@triton.jit
def parts_stride(n_segments, how):
    """Floats of a row's parts: its segments, the target's logit."""
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
        # other warps may write the gradient, in place, over it. Elsewhere after them: it would cost
        # a register in the loop.
        if how.HAS_GRADIENT:
            z = target_logit(row, target, vocab_size, s, how)
        sums = row_sums(row, vocab_size, s, how, EVICTION)
        if not how.HAS_GRADIENT:
            z = target_logit(row, target, vocab_size, s, how)
        return sums, sampled(z, sums.z_ref, s)


@triton.jit(do_not_specialize=["logits", "parts", "targets", "weights", *INTEGERS])
def segments_kernel(
    logits, parts, targets, weights, has_weights, numbers, stride: tl.int64, vocab_size, how
):
    """The states of the segments of every row, a program each, in ``parts``."""
    i, segment = program_row(), tl.program_id(1)
    target = tl.load(targets + i)
    weight = tl.load(weights + i, mask=has_weights > 0.0, other=1.0)
    if (target != IGNORED) & (weight != 0.0):
        s = scaling(numbers)
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
