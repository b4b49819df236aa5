"""Sampling filters (top-k, top-p, min-p): logits outside a token's kept ids become -inf.

A sampler with a filter draws from the distribution renormalized over the kept ids. logp, entropy,
polarity and their gradients are then those of that distribution, on every backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from papo_kernels.types import IGNORE_INDEX

_GROUP = 2**19  # ids handled together: their indices and values take about 20 MiB


class KeepSet(NamedTuple):
    """The ids that each token's sampling filter (top-k, top-p, min-p) kept, as compressed rows.

    Attributes:
        offsets: ``[N + 1]`` int64, nondecreasing, from 0 to nnz: token i kept
            ``ids[offsets[i] : offsets[i + 1]]``, in any order; N counts the tokens of `targets` in
            row-major order.
        ids: ``[nnz]`` int64 in [0, vocab_size), the sampled id of each token among its own.
    """

    offsets: Tensor
    ids: Tensor


class KeepMask:
    """A `KeepSet` ready to be applied to chunks of logits.

    On a GPU the offsets are copied to the host once, which waits for the device.

    Args:
        offsets, ids: of the `KeepSet`, on the device of the logits.
        targets: ``[N]`` int64 sampled ids; rows of -100 need not keep anything.
        vocab_size: ids from there on are out of range.
        checked: an earlier `KeepMask` of these ids has been made, and has not raised.

    Raises:
        ValueError: offsets that are not those of N rows over `ids`. On a CPU also an id out of
            range and a sampled id that was not kept; on a GPU these make their rows NaN.
    """

    def __init__(
        self, offsets: Tensor, ids: Tensor, targets: Tensor, vocab_size: int, checked: bool = False
    ) -> None:
        self._ids, self._targets, self._vocab_size = ids, targets, vocab_size
        self._counts = offsets.diff()
        self._host = offsets.cpu()
        self._host_counts = self._host.diff()
        ends = (int(self._host[0]), int(self._host[-1]))
        if ends != (0, ids.numel()) or bool((self._host_counts < 0).any()):
            raise ValueError(
                f"keep.offsets: expected nondecreasing values from 0 to {ids.numel()} (the number "
                f"of keep.ids), got {ends[0]} to {ends[1]}"
                + (" with a decrease" if bool((self._host_counts < 0).any()) else "")
            )
        self._checked = ids.device.type == "cpu"
        if self._checked and not checked:
            self._check_ids()

    def _check_ids(self) -> None:
        for first, stop, ids, row_of in self._groups(slice(0, self._targets.numel())):
            targets = self._targets[first:stop]
            outside = (ids < 0) | (ids >= self._vocab_size)
            if outside.any():
                at = int(outside.nonzero()[0])
                raise ValueError(
                    f"keep.ids: expected values in [0, {self._vocab_size}), got {int(ids[at])} "
                    f"for the token at flat position {first + int(row_of[at])}"
                )
            lost = self._lost(targets, ids, row_of)
            if lost.any():
                at = int(lost.nonzero()[0])
                raise ValueError(
                    f"keep: expected the sampled id among the kept ones, but id {int(targets[at])} "
                    f"of the token at flat position {first + at} is not; a filter never removes "
                    "what was sampled from it"
                )

    @staticmethod
    def _lost(targets: Tensor, ids: Tensor, row_of: Tensor) -> Tensor:
        """Which rows did not keep their target."""
        found = torch.zeros_like(targets).index_add_(0, row_of, (ids == targets[row_of]).long())
        return (found == 0) & (targets != IGNORE_INDEX)

    def _groups(self, rows: slice | Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Runs `[first, stop)` of `rows` with their kept ids, and the place in the run of the row
        that each id belongs to."""
        counts, host_counts = self._counts[rows], self._host_counts[rows]
        ends = host_counts.cumsum(0)
        first, done, total = 0, 0, host_counts.numel()
        while first < total:
            fitting = int(torch.searchsorted(ends, done + _GROUP, right=True))
            stop = max(first + 1, fitting)
            many = int(ends[stop - 1]) - done
            row_of = torch.repeat_interleave(
                torch.arange(stop - first, device=counts.device),
                counts[first:stop],
                output_size=many,
            )
            if isinstance(rows, slice):
                start = int(self._host[rows.start + first])
                ids = self._ids[start : start + many]
            else:
                before = ends[first:stop] - host_counts[first:stop] - done
                shift = self._host[:-1][rows[first:stop]] - before
                ids = self._ids[torch.arange(many) + shift[row_of]]
            yield first, stop, ids, row_of
            first, done = stop, done + many

    def apply(self, logits: Tensor, rows: slice | Tensor, first_column: int = 0) -> None:
        """Masks a chunk in place.

        Args:
            logits: ``[n, C]``, unit column stride: columns first_column .. first_column + C of the
                vocabulary.
            rows: which of the N tokens the chunk holds.
        """
        columns, pitch = logits.shape[1], logits.stride(0)
        targets = self._targets[rows]
        for first, stop, ids, row_of in self._groups(rows):
            part = logits[first:stop]
            column = ids - first_column
            inside = (column >= 0) & (column < columns)
            place = row_of * pitch + column.clamp_(0, columns - 1)
            span = ((stop - first - 1) * pitch + columns,)
            flat = part.as_strided(span, (1,))
            kept = torch.where(inside, flat[place], -torch.inf)
            part.fill_(-torch.inf)
            # The maximum: an id of another shard is clamped onto a column that may itself be kept.
            flat.scatter_reduce_(0, place, kept, "amax")
            if not self._checked:
                self._spoil(part, targets[first:stop], ids, row_of)

    def _spoil(self, part: Tensor, targets: Tensor, ids: Tensor, row_of: Tensor) -> None:
        outside = ((ids < 0) | (ids >= self._vocab_size)).long()
        wrong = torch.zeros_like(targets).index_add_(0, row_of, outside) > 0
        wrong |= self._lost(targets, ids, row_of)
        part[:, :1].masked_fill_(wrong[:, None], torch.nan)
