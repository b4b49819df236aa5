"""Host side of every kernel: how rows are cut, and what is and is not a reason to compile.

A kernel's variants are the dtypes and the fields of ``tile.Variant``; nothing else leads to a
compilation, so that pointers and integers are kept from Triton's specialisation: top-level ones by
``do_not_specialize``, those in tuples by being 16-byte aligned, or floats.
"""

from __future__ import annotations

import contextlib
import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from papo_kernels.checks import check_columns
from papo_kernels.types import RowParams

from .source import HIGH, LOGITS, PARTS, Count, Numbers, segments_kernel
from .tile import N_SUMS, SEGMENT_TILES, WORD_BYTES, Variant

PROGRAMS_PER_SM = 4  # resident programs that keep an SM's share of the memory system busy


class Geometry(NamedTuple):
    """How a program reads a row: its threads, and their words in a tile."""

    lanes: int
    vectors: int


TINY_ROW, SHORT_ROW, LONG_ROW = Geometry(128, 1), Geometry(128, 4), Geometry(256, 4)


@cache
def geometry(n_columns: int) -> Geometry:
    """A function of the columns alone, or the bits of a row's results would depend on more."""
    if n_columns <= 1024:
        return TINY_ROW
    return SHORT_ROW if n_columns <= 4096 else LONG_ROW


@cache
def variant(geometry: Geometry, softcap: bool = False, **fields: Any) -> Variant:
    values = Variant(*geometry, softcap, **fields)
    return Variant(*map(tl.constexpr, values))


@cache
def count(n: int) -> Count:
    return Count(*map(float, divmod(n, HIGH.value)))


class Call(NamedTuple):
    """What the launches of one call share."""

    logits: Tensor
    row: RowParams
    aligned: bool

    def variant(self, **fields: Any) -> Variant:
        return variant(geometry(self.row.vocab_size), self.row.softcap > 0.0, **fields)

    def numbers(self, n_parts: int) -> Numbers:
        t, counts = self.row.temperature, (self.row.vocab_size, self.logits.shape[1], n_parts)
        scales = (1.0 / t, math.log2(math.e) / t, self.row.softcap)
        return Numbers(*scales, -math.inf if self.row.sharded else math.nan, *map(count, counts))

    def run(self, kernel: Any, n_parts: int, *args: Any) -> None:
        """`n_parts` programs a row; the last argument is the variant."""
        launch(kernel, self.logits.device, self.logits.shape[0] * n_parts, *args)


def prepare(logits: Tensor, row: RowParams) -> Call:
    check_columns(logits)
    return Call(logits, row, is_aligned(logits))


# ---- splitting rows -------------------------------------------------------------------------


@cache
def _n_sm(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter: few, so that tests split rows and do not
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def count_segments(vocab_size: int, itemsize: int) -> int:
    """As ``tile.count_segments`` does."""
    lanes, vectors = geometry(vocab_size)
    n_words = 0 if vocab_size <= lanes else vocab_size * itemsize // WORD_BYTES - 1
    return max(triton.cdiv(n_words, lanes * vectors * SEGMENT_TILES.value), 1)


def count_parts(call: Call) -> int:
    """Programs of a row: one where there are rows enough for the device, else one a segment."""
    logits = call.logits
    if logits.shape[0] >= PROGRAMS_PER_SM * _n_sm(logits.device):
        return 1
    return count_segments(call.row.vocab_size, logits.element_size())


def read_rows(call: Call, targets: Tensor, weights: Tensor | None) -> tuple[int, Tensor]:
    """Where the kernel that follows finds the rows' states, as its SOURCE and its source.

    The states of split rows are computed here, in a buffer of at most 5 KiB a segment.
    """
    logits, n_parts = call.logits, count_parts(call)
    if n_parts == 1:
        return LOGITS.value, logits
    how = call.variant(ALIGNED=call.aligned)
    floats = ((n_parts + 1) * N_SUMS.value + 1) * how.LANES.value
    parts = logits.new_empty((logits.shape[0], floats), dtype=torch.float32)
    has_weights = int(weights is not None)
    weights = parts if weights is None else weights
    numbers, stride = call.numbers(n_parts), logits.stride(0)
    call.run(
        segments_kernel, n_parts, logits, parts, targets, weights, has_weights, numbers, stride, how
    )
    return PARTS.value, parts


def scaling_programs(dlogits: Tensor) -> int:
    """Few enough to cost little where the factor is 1, which only the device knows."""
    return min(dlogits.shape[0] * dlogits.shape[1], 4 * PROGRAMS_PER_SM * _n_sm(dlogits.device))


# ---- tensors --------------------------------------------------------------------------------


def is_aligned(rows: Tensor) -> bool:
    """Whether every row starts on a 16-byte boundary."""
    size = rows.element_size()
    return rows.data_ptr() % WORD_BYTES == 0 and rows.stride(0) * size % WORD_BYTES == 0


def same_words(logits: Tensor, dlogits: Tensor) -> bool:
    """Whether the elements of a 16-byte word of logits lie in one aligned word of dlogits."""
    word = WORD_BYTES // logits.element_size()
    offset = (
        logits.data_ptr() // logits.element_size() - dlogits.data_ptr() // dlogits.element_size()
    )
    return offset % word == 0 and (logits.stride(0) - dlogits.stride(0)) % word == 0


def row_tensor(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values [N]` contiguous, in `dtype`, on a 16-byte boundary: Triton specialises on that."""
    values = values.to(dtype).contiguous()
    return values if values.data_ptr() % WORD_BYTES == 0 else values.clone()


# ---- launches -------------------------------------------------------------------------------


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@cache
def _warp_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def options(kernel: Any, how: Variant, warp_size: int, nvidia: bool) -> dict[str, Any]:
    """Launch options. Without contraction of a * b + c, in which two kernels might differ."""
    chosen = {
        "num_warps": how.LANES.value // warp_size,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }
    more = not how.ALIGNED.value or kernel.__name__ == "policy_loss_kernel"
    if nvidia and more and how.SOURCE.value == LOGITS.value:
        # ptxas would spill a few bytes to reach 64 registers (80 with a soft cap).
        chosen["maxnreg"] = 128 if how.HAS_SOFTCAP.value else 80
    return chosen


def launch(kernel: Any, device: torch.device, programs: int, *args: Any) -> None:
    """`programs` programs; the last argument is the variant."""
    if programs == 0:
        return
    nvidia = torch.version.hip is None
    chosen = options(kernel, args[-1], _warp_size(device), nvidia)
    with _on(device):
        kernel[(programs,)](*args, **chosen)
