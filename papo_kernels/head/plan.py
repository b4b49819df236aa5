"""A call's tokens in chunks: the plan and the reused workspace.

Shapes: ``hidden [N, D]``, ``weight [V, D]``, a chunk's ``logits [n, V]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Selection = slice | Tensor  # of rows: consecutive ones, or int64 indices

_ALIGN = 64  # elements: rows of logits start on cache lines and vector loads
# Where float32 logits have a half-precision gradient: few enough chunks for a product to be
# efficient, enough for most of the workspace to go to the slab.
_CHUNKS_PER_SLAB = 8
_TILE_ROWS = 128  # of a matrix product on a GPU
_CPU_WORKSPACE = 256 * 2**20
# A GPU's workspace. Every slab of tokens reads and writes the weight's gradient in float32. With
# slabs of a few thousand tokens that takes no more than a few percent of the products' time.
_GPU_WORKSPACE_SHARE = 32


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


def default_workspace(device: torch.device) -> int:
    """Bytes: 256 MiB, and at least 1/32 of a GPU's memory."""
    if device.type != "cuda":
        return _CPU_WORKSPACE
    total = torch.cuda.get_device_properties(device).total_memory
    return max(_CPU_WORKSPACE, total // _GPU_WORKSPACE_SHARE)


# ---- the workspace ------------------------------------------------------------------------------


class Active(NamedTuple):
    """The rows to compute.

    Attributes:
        rows: their indices, or the number of all rows where none is left out.
        ignored: `[N]` bool, which of them do not count nevertheless; None where all count.
    """

    rows: Tensor | int
    ignored: Tensor | None

    @property
    def total(self) -> int:
        return self.rows if isinstance(self.rows, int) else self.rows.numel()


def active_rows(ignored: Tensor) -> Active:
    """All rows but the ignored ones. On a GPU all rows, of which the kernels skip the ignored ones:
    to leave them out, the host would have to wait for their number."""
    if ignored.device.type != "cpu":
        return Active(ignored.shape[0], ignored)
    rows = (~ignored).nonzero()[:, 0]
    return Active(ignored.shape[0] if rows.numel() == ignored.numel() else rows, None)


def _even(total: int, most: int) -> int:
    """Rows of each of the fewest pieces of at most `most` rows, whole tiles of a product where that
    fits: a product of 129 rows takes as long as one of 256."""
    if total <= most:
        return total
    most -= most % _TILE_ROWS if most > _TILE_ROWS else 0
    size = -(-total // -(-total // most))
    return min(most, -(-size // _TILE_ROWS) * _TILE_ROWS)


class Plan(NamedTuple):
    """How a call's rows go through its workspace.

    A chunk is the rows whose logits are held at once. A slab is the rows whose gradient of the
    logits is held at once, for the two products that follow: one chunk or several. It is several
    where float32 logits have a half-precision gradient, in a buffer of its own. Otherwise the
    gradient replaces the logits, and a slab is one chunk.
    """

    slab_rows: int
    chunk_rows: int
    slabs: int
    pitch: int  # elements from row to row
    narrow: bool  # whether the gradient has a buffer of its own


def make_plan(
    rows: int,
    columns: int,
    hidden_size: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    backward: bool,
    budget: int,
    sum_bytes: int = 0,
) -> Plan:
    """The plan of a call.

    Args:
        columns: of the logits, the largest shard's where the vocabulary is split.
        dtypes: of hidden states and logits.
        backward: whether gradients of the logits are formed.
        budget: bytes that the buffers may take; one row is held whatever it takes.
        sum_bytes: what several slabs cost on top of it: the lower halves of the float32 sum of a
            half-precision weight's gradient. One slab needs no sum, so one is planned where it fits
            `budget` + `sum_bytes`: it is both smaller and faster.
    """
    operand, dtype = dtypes
    pitch = -(-max(1, columns) // _ALIGN) * _ALIGN
    narrow = backward and operand != dtype
    # Rows of hidden states that are gathered, widened or masked count too.
    row_bytes = (pitch + 2 * hidden_size) * dtype.itemsize
    if not narrow:
        slab = _even(rows, max(1, budget // row_bytes))
        return Plan(slab, slab, -(-rows // max(1, slab)), pitch, narrow)
    slab_row_bytes = pitch * operand.itemsize
    most = max(1, int(budget / (row_bytes / _CHUNKS_PER_SLAB + slab_row_bytes)))
    chunk = max(1, most // _CHUNKS_PER_SLAB)
    left = (budget + sum_bytes - rows * slab_row_bytes) // row_bytes
    if rows > most and left >= min(_TILE_ROWS, rows):
        most, chunk = rows, min(left, max(chunk, _TILE_ROWS))
    slab = _even(rows, most)
    return Plan(slab, _even(slab, chunk), -(-rows // max(1, slab)), pitch, narrow)


def _rows_of(like: Tensor, rows: int, pitch: int, dtype: torch.dtype) -> Tensor:
    """`[rows, pitch]` without values, but with zeros in the padding that a row may end with.

    oneDNN's bfloat16 products on AMX tiles multiply what lies behind a row's columns with zeros,
    and NaN times zero is NaN (torch 2.13; seen 2026-11-27).
    """
    buffer = like.new_empty((rows, pitch), dtype=dtype)
    if like.device.type == "cpu":
        buffer[:, pitch - _ALIGN :].zero_()
    return buffer


class Workspace:
    """The buffers that every chunk's logits and their gradient pass through.

    Args:
        hidden: `[N, D]`, for dtype and device.
        active: the rows to compute.
        dtype: of the logits.
        narrowing: whether the row kernels write the gradient of float32 logits in half precision.
    """

    def __init__(
        self, hidden: Tensor, active: Active, plan: Plan, dtype: torch.dtype, narrowing: bool
    ) -> None:
        self._active, self._narrowing = active.rows, narrowing
        self._slab_rows, self._chunk_rows = plan.slab_rows, plan.chunk_rows
        self._logits = _rows_of(hidden, plan.chunk_rows, plan.pitch, dtype)
        self._narrow = None
        if plan.narrow:
            self._narrow = _rows_of(hidden, plan.slab_rows, plan.pitch, hidden.dtype)

    def over_slabs(self) -> Iterator[Selection]:
        """The rows of each slab in turn."""
        active = self._active
        total = active if isinstance(active, int) else active.numel()
        for first in range(0, total, max(1, self._slab_rows)):
            part = slice(first, min(first + self._slab_rows, total))
            yield part if isinstance(active, int) else active[part]

    def over_chunks(self, slab: Selection) -> Iterator[tuple[slice, Selection]]:
        """Each chunk's place in the slab, and its rows."""
        total = slab.stop - slab.start if isinstance(slab, slice) else slab.numel()
        for first in range(0, total, max(1, self._chunk_rows)):
            part = slice(first, min(first + self._chunk_rows, total))
            if isinstance(slab, slice):
                yield part, slice(slab.start + part.start, slab.start + part.stop)
            else:
                yield part, slab[part]

    def logits(self, rows: int, columns: int) -> Tensor:
        return self._logits[:rows, :columns]

    def dlogits(self, part: slice, columns: int) -> Tensor:
        """The gradient of the rows at `part` of the slab, for the products."""
        if self._narrow is None:
            return self._logits[: part.stop - part.start, :columns]
        return self._narrow[part, :columns]

    def kernel_target(self, part: slice, columns: int) -> Tensor:
        """Where the row kernel writes the gradient of the chunk at `part`: over the logits where it
        keeps their dtype; `keep_gradient` then moves it."""
        if self._narrow is None or not self._narrowing:
            return self._logits[: part.stop - part.start, :columns]
        return self._narrow[part, :columns]

    def keep_gradient(self, part: slice, columns: int) -> None:
        if self._narrow is not None and not self._narrowing:
            self._narrow[part, :columns] = self._logits[: part.stop - part.start, :columns]
