# ruff: noqa: RUF005, SIM108, SIM300 - Triton has no starred tuples, and takes both sides of a
# conditional expression; DTYPE is no constant to ruff's eye.
"""How a row of logits is read: words, tiles, segments, and the state they add up to.

A row is read in 16-byte *words* counted from column 0, in tiles of a few words per thread. Where
rows do not start on a 16-byte boundary (with an odd V most do not), a word is put together from the
two aligned words that it straddles. The last word or so is read element by element, so that nothing
outside the matrix is read. Rows of a few columns are read that way too.

Tiles are grouped in segments, and a row's state is folded segment by segment. One program reads
them all or, where rows are few, one program reads each. So the bits of a result depend on the row
alone: not on its neighbors, its place in the batch, its alignment, or the device.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_state import (
    NEG_INF,
    LaneStates,
    capped,
    combined,
    empty_states,
    merged,
    single_states,
    updated,
)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
WORD_BYTES = 16
N_SUMS = tl.constexpr(5)  # fields of LaneStates


class Variant(NamedTuple):
    """What a kernel is compiled for, besides dtypes. The fields are ``tl.constexpr``."""

    LANES: int  # threads of a program
    VECTORS: int  # words per thread in a tile
    SEGMENT_TILES: int  # tiles per segment
    HAS_SOFTCAP: bool
    ALIGNED: bool = False  # rows of logits start on 16-byte boundaries
    SAME_WORDS: bool = False  # a word of logits is one of dlogits
    SOURCE: int = 0  # of the row's state, see source.py
    HAS_GRADIENT: bool = False
    HAS_SQUARES: bool = False  # the gradient has terms in p^2: that of unit polarity
    HAS_TEMPERATURES: bool = False  # each row has its own
    # What an `Objective` is besides its numbers.
    SURROGATE: str = ""
    KL_ESTIMATOR: str = ""  # k1, k2, k3 or abs
    KL_SLOPE_OF_K2: bool = False
    KL_RATIO: bool = False


class Row(NamedTuple):
    """A 16-byte aligned pointer, and how many elements lie between it and column 0."""

    ptr: tl.tensor
    head: tl.tensor


@triton.jit
def row_at(ptr, row, stride):
    """Row ``row`` of a matrix, both int64."""
    BYTES: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    start = ptr + row * stride
    head = (start.to(tl.int64) & 15) // BYTES
    return Row(tl.multiple_of(start - head, 16), head.to(tl.int32))


# ---- words ----------------------------------------------------------------------------------


@triton.jit
def masked_word(DTYPE: tl.constexpr):
    """32 bits of -inf."""
    if DTYPE == tl.bfloat16:
        return -0x7F0080
    elif DTYPE == tl.float16:
        return -0x3FF0400
    else:
        return -0x800000


@triton.jit
def aligned_words(ptr, n, LANES: tl.constexpr, MASKED: tl.constexpr, EVICTION: tl.constexpr):
    """``LANES`` words of 4 int32 at a 16-byte aligned pointer; from the n-th on -inf if MASKED."""
    index = tl.arange(0, 4 * LANES)
    words = ptr.to(tl.pointer_type(tl.int32), bitcast=True) + index
    if MASKED:
        inside = index // 4 < n  # constant over a word, so that the access stays 16 bytes wide
        other = masked_word(ptr.dtype.element_ty)
        x = tl.load(words, mask=inside, other=other, eviction_policy=EVICTION)
    else:
        x = tl.load(words, eviction_policy=EVICTION)
    return tl.reshape(x, [LANES, 4])


@triton.jit
def quarters(words, LANES: tl.constexpr):
    even, odd = tl.split(tl.reshape(words, [LANES, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def shifted_words(low, high, head, LANES: tl.constexpr, BITS: tl.constexpr):
    """The words that start ``head`` elements of BITS bits into ``low``, ``high`` following it."""
    a = quarters(low, LANES) + quarters(high, LANES)
    skipped = head * BITS // 32
    by_two = ()
    for i in tl.static_range(6):
        by_two = by_two + (tl.where(skipped >= 2, a[i + 2], a[i]),)
    by_one = ()
    for i in tl.static_range(5):
        by_one = by_one + (tl.where(skipped % 2 == 1, by_two[i + 1], by_two[i]),)
    out = ()
    for i in tl.static_range(4):
        if BITS == 32:
            out = out + (by_one[i],)
        else:
            # One funnel shift: the low half of 64 bits moved by 0 or 16.
            pair = (by_one[i + 1].to(tl.int64) << 32) | by_one[i].to(tl.uint32, bitcast=True)
            out = out + ((pair >> (head % 2 * 16)).to(tl.int32),)
    return tl.reshape(tl.join(tl.join(out[0], out[2]), tl.join(out[1], out[3])), [LANES, 4])


@triton.jit
def unpacked(words, DTYPE: tl.constexpr):
    """The elements of words as float32 blocks; of two-byte types the even, then the odd ones."""
    if DTYPE == tl.float32:
        return (words.to(tl.float32, bitcast=True),)
    elif DTYPE == tl.bfloat16:
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & -65536).to(tl.float32, bitcast=True)
        return (even, odd)
    else:
        even = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return (even, odd)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 to ``DTYPE``, to nearest even; the interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def load_tile(row, word, n_words, s, how, VECTORS: tl.constexpr, EVICTION: tl.constexpr):
    """Softcapped blocks of VECTORS words per thread, from word ``word`` of the row's ``n_words``.

    A single vector may reach beyond the row's end: it is -inf from there on.
    """
    MASKED: tl.constexpr = VECTORS == 1
    DTYPE: tl.constexpr = row.ptr.dtype.element_ty
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    # 64 bits, so that a tile's vectors lie at constant distances and share their address.
    from_ptr = tl.multiple_of(row.ptr + word.to(tl.int64) * (128 // BITS), 16)
    tile = ()
    for v in tl.static_range(VECTORS):
        n = n_words - word - v * how.LANES
        ptr = from_ptr + v * how.LANES * (128 // BITS)
        words = aligned_words(ptr, n, how.LANES, MASKED, EVICTION)
        if not how.ALIGNED:
            following = aligned_words(ptr + 128 // BITS, n, how.LANES, MASKED, EVICTION)
            words = shifted_words(words, following, row.head, how.LANES, BITS)
        blocks = unpacked(words, DTYPE)
        if how.HAS_SOFTCAP:
            for i in tl.static_range(len(blocks)):
                tile = tile + (capped(blocks[i], s),)
        else:
            tile = tile + blocks
    return tile


# ---- states ---------------------------------------------------------------------------------


@triton.jit
def count_words(n_columns, WORD: tl.constexpr, how):
    """Whole words except the last one, whose aligned neighbor may end outside the matrix."""
    return tl.where(n_columns <= how.LANES, 0, n_columns // WORD - 1)


@triton.jit
def count_segments(n_columns, DTYPE: tl.constexpr, how):
    n_words = count_words(n_columns, 128 // DTYPE.primitive_bitwidth, how)
    return tl.maximum(tl.cdiv(n_words, how.LANES * how.VECTORS * how.SEGMENT_TILES), 1)


@triton.jit
def rest_of_row(row, n_columns, s, how):
    """The states of the elements after the words, one per lane."""
    WORD: tl.constexpr = 128 // row.ptr.dtype.element_ty.primitive_bitwidth
    column = count_words(n_columns, WORD, how) * WORD + tl.arange(0, how.LANES)
    z = tl.load(row.ptr + (row.head + column), mask=column < n_columns, other=NEG_INF)
    z = z.to(tl.float32)
    if how.HAS_SOFTCAP:
        z = capped(z, s)
    return single_states(z, s.log2_scale)


@triton.jit
def segment_states(row, n_columns, segment, lanes, s, how, EVICTION: tl.constexpr):
    """``lanes`` with the words of one segment added."""
    TILE: tl.constexpr = how.LANES * how.VECTORS
    n_words = count_words(n_columns, 128 // row.ptr.dtype.element_ty.primitive_bitwidth, how)
    word = segment * (how.SEGMENT_TILES * TILE)
    end = tl.minimum(word + how.SEGMENT_TILES * TILE, n_words)
    if how.VECTORS > 1:
        while word + TILE <= end:
            tile = load_tile(row, word, n_words, s, how, how.VECTORS, EVICTION)
            lanes = updated(lanes, tile, s.log2_scale)
            word += TILE
    while word < end:
        tile = load_tile(row, word, n_words, s, how, 1, EVICTION)
        lanes = updated(lanes, tile, s.log2_scale)
        word += how.LANES
    return lanes


@triton.jit
def row_sums(row, n_columns, s, how, EVICTION: tl.constexpr):
    """The sums of the first ``n_columns`` of a row, by one program; of 0 columns nothing is read.

    The first segment continues the states of the elements after the words.
    """
    n_segments = count_segments(n_columns, row.ptr.dtype.element_ty, how)
    lanes = rest_of_row(row, n_columns, s, how)
    folded = empty_states(how.LANES)
    segment = 0
    while segment < n_segments:
        lanes = segment_states(row, n_columns, segment, lanes, s, how, EVICTION)
        if segment == 0:
            folded = lanes
        else:
            folded = combined(folded, lanes, s.log2_scale)
        lanes = empty_states(how.LANES)
        segment += 1
    return merged(folded, s)


# ---- states of split rows -------------------------------------------------------------------


@triton.jit
def store_states(ptr, lanes, how):
    at = ptr + tl.arange(0, how.LANES)
    for i in tl.static_range(N_SUMS):
        tl.store(at + i * how.LANES, lanes[i])


@triton.jit
def load_states(ptr, how):
    at = ptr + tl.arange(0, how.LANES)
    return LaneStates(
        tl.load(at),
        tl.load(at + how.LANES),
        tl.load(at + 2 * how.LANES),
        tl.load(at + 3 * how.LANES),
        tl.load(at + 4 * how.LANES),
    )


@triton.jit
def row_sums_of_parts(ptr, n_segments, s, how):
    """The sums of a row from the states its segments' programs stored, folded as ``row_sums``."""
    lanes = load_states(ptr, how)
    segment = 1
    while segment < n_segments:
        part = load_states(ptr + segment * (N_SUMS * how.LANES), how)
        lanes = combined(lanes, part, s.log2_scale)
        segment += 1
    return merged(lanes, s)
