# ruff: noqa: RUF005 - Triton has no starred tuples.
"""How a row's gradient is written: in 16-byte words, wherever the row starts, or as zeros.

The gradient is formed element by element. So, unlike the state, it may be cut by *position*,
counted from the 16-byte boundary at or before the row: into whole aligned words and the few
elements before and after them, the *ends*. Tiles and segments are as long as those of ``tile.py``.
They are walked from the last to the first: the end of the row is what a preceding pass left in the
L2 cache.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_grad import gradient
from .tile import Row, aligned_words, rounded, unpacked


class Span(NamedTuple):
    """Columns of a row by their positions."""

    first: tl.tensor
    end: tl.tensor
    first_word: tl.tensor
    n_words: tl.tensor  # whole ones


class Part(NamedTuple):
    """Which part of a row a program writes: one segment, or all of it where ``n_parts`` is 1."""

    index: tl.tensor
    n_parts: tl.tensor


@triton.jit
def program_part():
    return Part(tl.program_id(1), tl.num_programs(1))


@triton.jit
def row_beside(ptr, row, stride, head):
    """A row of the gradient, by the positions of a row of logits whose head is ``head``."""
    return Row(ptr + (row * stride - head), head)


@triton.jit
def span_of(head, begin, end, WORD: tl.constexpr):
    """Columns [begin, end)."""
    first = head + begin
    last = head + end
    first_word = (first + (WORD - 1)) // WORD
    return Span(first, last, first_word, tl.maximum(last // WORD - first_word, 0))


@triton.jit
def end_positions(span, WORD: tl.constexpr, how):
    """Positions of the elements outside the whole words, and which lanes have one."""
    lane = tl.arange(0, how.LANES)
    before = (span.first_word - 1) * WORD + lane
    after = (span.first_word + span.n_words - 1) * WORD + lane
    position = tl.where(lane < WORD, before, after)
    return position, (position >= span.first) & (position < span.end) & (lane < 2 * WORD)


@triton.jit
def part_words(span, part, how):
    """Words [begin, end) of a program's part, counted from the span's first."""
    SEGMENT: tl.constexpr = how.LANES * how.VECTORS * how.SEGMENT_TILES
    begin = tl.where(part.n_parts > 1, part.index * SEGMENT, 0)
    last = tl.where(part.index + 1 < part.n_parts, begin + SEGMENT, span.n_words)
    return begin, tl.minimum(last, span.n_words)


# ---- the gradient ---------------------------------------------------------------------------


@triton.jit
def store_words(ptr, blocks, n, LANES: tl.constexpr, MASKED: tl.constexpr):
    """``LANES`` words of float32 blocks, rounded to the pointer's type; none from the n-th on."""
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    WORD: tl.constexpr = 4 * len(blocks)
    if len(blocks) == 1:
        x = rounded(blocks[0], DTYPE)
    else:
        x = tl.join(rounded(blocks[0], DTYPE), rounded(blocks[1], DTYPE))
    x = tl.reshape(x, [WORD * LANES])
    index = tl.arange(0, WORD * LANES)
    if MASKED:
        tl.store(ptr + index, x, mask=index // WORD < n)
    else:
        tl.store(ptr + index, x)


@triton.jit
def write_tile(source, out, word, n, grad, s, how, VECTORS: tl.constexpr):
    """The gradient of VECTORS words per thread, from word ``word`` by position; ``n`` are left.

    A single vector may reach beyond the span's end.
    """
    MASKED: tl.constexpr = VECTORS == 1
    DTYPE: tl.constexpr = source.ptr.dtype.element_ty
    WORD: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    # 64 bits, so that a tile's vectors lie at constant distances and share their address.
    first = word.to(tl.int64) * WORD
    from_ptr, to_ptr = tl.multiple_of(source.ptr + first, 16), out.ptr + first
    if how.SAME_WORDS:
        to_ptr = tl.multiple_of(to_ptr, WORD * (out.ptr.dtype.element_ty.primitive_bitwidth // 8))
    tile = ()
    for v in tl.static_range(VECTORS):
        ptr = from_ptr + v * how.LANES * WORD
        left = n - v * how.LANES
        tile = tile + (aligned_words(ptr, left, how.LANES, MASKED, "evict_first"),)
    for v in tl.static_range(VECTORS):
        blocks = unpacked(tile[v], DTYPE)
        dz = ()
        for i in tl.static_range(len(blocks)):
            dz = dz + (gradient(blocks[i], grad, s, how.HAS_SOFTCAP, how.HAS_SQUARES),)
        ptr = to_ptr + v * how.LANES * WORD
        store_words(ptr, dz, n - v * how.LANES, how.LANES, MASKED)


@triton.jit
def write_ends(source, out, span, grad, s, WORD: tl.constexpr, how):
    position, exists = end_positions(span, WORD, how)
    z = tl.load(source.ptr + position, mask=exists, other=0.0).to(tl.float32)
    dz = gradient(z, grad, s, how.HAS_SOFTCAP, how.HAS_SQUARES)
    tl.store(out.ptr + position, rounded(dz, out.ptr.dtype.element_ty), mask=exists)


@triton.jit
def write_target(out, span, part, target, grad, WORD: tl.constexpr, how):
    """The sampled token's gradient, over what the tiles left there; none where ``target`` < 0."""
    position = out.head + target
    word = position // WORD - span.first_word
    in_words = (word >= 0) & (word < span.n_words)
    owner = tl.where(in_words, word // (how.LANES * how.VECTORS * how.SEGMENT_TILES), 0)
    mine = tl.minimum(owner, part.n_parts - 1) == part.index
    # All threads have written their words before one of them overwrites an element.
    tl.debug_barrier()
    value = rounded(grad.target, out.ptr.dtype.element_ty)
    tl.store(out.ptr + position, value, mask=mine & (target >= 0))


@triton.jit
def write_gradient(source, out, n_columns, target, part, grad, s, how):
    """A part of the gradient of a row's first ``n_columns``. ``out`` may be ``source``."""
    WORD: tl.constexpr = 128 // source.ptr.dtype.element_ty.primitive_bitwidth
    TILE: tl.constexpr = how.LANES * how.VECTORS
    span = span_of(source.head, 0, n_columns, WORD)
    begin, end = part_words(span, part, how)
    in_tiles = tl.maximum(end - begin, 0) // TILE * TILE
    if how.VECTORS == 1:
        in_tiles = 0
    word = begin + in_tiles
    while word < end:
        write_tile(source, out, span.first_word + word, end - word, grad, s, how, 1)
        word += how.LANES
    if how.VECTORS > 1:
        word = begin + in_tiles
        while word > begin:
            word -= TILE
            write_tile(source, out, span.first_word + word, TILE, grad, s, how, how.VECTORS)
    if part.index == 0:
        write_ends(source, out, span, grad, s, WORD, how)
    write_target(out, span, part, target, grad, WORD, how)


# ---- zeros and scaling ----------------------------------------------------------------------


@triton.jit
def fill_zeros(out, begin, end, part, how):
    """A part of columns [begin, end) of a row given by its own head."""
    DTYPE: tl.constexpr = out.ptr.dtype.element_ty
    WORD: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    span = span_of(out.head, begin, end, WORD)
    word, last = part_words(span, part, how)
    index = tl.arange(0, how.LANES * WORD)
    zeros = tl.zeros([how.LANES * WORD], DTYPE)
    while word < last:
        ptr = tl.multiple_of(out.ptr + (span.first_word + word) * WORD, 16)
        tl.store(ptr + index, zeros, mask=index // WORD < last - word)
        word += how.LANES
    if part.index == 0:
        position, exists = end_positions(span, WORD, how)
        tl.store(out.ptr + position, tl.zeros([how.LANES], DTYPE), mask=exists)


@triton.jit
def scale_part(row, n_columns, part, factor, how):
    """A part of a row times ``factor``, in place."""
    DTYPE: tl.constexpr = row.ptr.dtype.element_ty
    WORD: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    span = span_of(row.head, 0, n_columns, WORD)
    word, last = part_words(span, part, how)
    index = tl.arange(0, how.LANES * WORD)
    while word < last:
        ptr = tl.multiple_of(row.ptr + (span.first_word + word) * WORD, 16) + index
        inside = index // WORD < last - word
        x = tl.load(ptr, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(ptr, rounded(x, DTYPE), mask=inside)
        word += how.LANES
    if part.index == 0:
        position, exists = end_positions(span, WORD, how)
        x = tl.load(row.ptr + position, mask=exists, other=0.0).to(tl.float32) * factor
        tl.store(row.ptr + position, rounded(x, DTYPE), mask=exists)
