"""A running average of gradients, kept beside AdamW's moments, and steps along it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from papo.dist import collectives
from papo.dist.adamw import GuardedAdamW
from papo.dist.partition import (
    COMPUTE,
    GRADIENT,
    MASTER,
    MOMENTS,
    Partition,
    read_share,
)

AVERAGE = "entropy_gradient"  # in a checkpoint
# Elements that are worked on at once: what fits a CPU's cache, or keeps a GPU busy.
_CHUNK, _CHUNK_CUDA = 1 << 18, 1 << 24
# Its multiples are spread evenly over the 2^16 steps of float32 between two bfloat16 numbers.
_GOLDEN = 40503

Named = Sequence[tuple[str, Partition]]


class GradientAverage:
    """Exponential average of gradients, of each parameter the share that this rank writes.

    What it works on are all trained parameters' partitions by name.

    Args:
        dtype: it is kept in.
        device: it is kept on.

    Attributes:
        count: gradients folded in; 0 where there is no average, which then takes no memory.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.count = 0
        self._dtype, self._device = dtype, device
        self._shares: dict[str, Tensor] = {}

    def share(self, name: str, numel: int) -> Tensor:
        """This rank's elements of a parameter's average, 0 before the first gradient.

        Args:
            numel: how many these are.
        """
        if name not in self._shares:
            self._shares[name] = torch.zeros(numel, dtype=self._dtype, device=self._device)
        return self._shares[name]

    def clear(self) -> None:
        """Begin anew."""
        self.count, self._shares = 0, {}

    def fold(self, parts: Named, decay: float) -> float:
        """Fold the present gradients in, unless they are not finite; their norm. A collective."""
        norm = self._norm(read_share(partition, GRADIENT) for _, partition in parts)
        if not math.isfinite(norm):
            return norm
        self.count += 1
        weight = (1 - decay) / (1 - decay**self.count)  # keeps the bias corrected
        for name, partition in parts:
            gradient = read_share(partition, GRADIENT)
            for kept, new in _chunks(self.share(name, len(gradient)), gradient):
                kept.copy_(kept.float().lerp_(new.to(kept.device), weight))
        return norm

    def dot_change(self, parts: Named, before: Mapping[str, Tensor]) -> float:
        """Inner product with the change of the compute weights; a collective.

        With bfloat16 weights that is not the change of the masters. Most steps are smaller than the
        distance of two bfloat16 numbers: few weights change at all, and those by much more than
        their step.

        Args:
            before: `compute_weights` before the change.
        """
        return self._summed(
            (new.float() - old).to(kept.device).mul_(kept)
            for name, partition in parts
            for kept, new, old in _chunks(
                self._shares[name], read_share(partition, COMPUTE), before[name]
            )
        )

    @contextlib.contextmanager
    def moved(
        self, parts: Named, adamw: GuardedAdamW, max_grad_norm: float, change: float
    ) -> Iterator[None]:
        """Compute weights inside are moved along the average, divided as AdamW would divide it; a
        collective.

        Args:
            max_grad_norm: that it would be clipped to.
            change: inner product of average and move, where the average is not 0.
        """
        norm = self._norm(self.share(name, len(partition.share)) for name, partition in parts)
        clip = min(1.0, max_grad_norm / norm) if norm else 1.0
        length = self._summed(
            direction.mul_(kept)
            for name, partition in parts
            for _, kept, direction in self._directions(name, partition, adamw, clip)
        )
        scale = change / length if length else 0.0
        masters = compute_weights([part for part in parts if part[1].is_master])
        try:
            for name, partition in parts:
                moved = read_share(partition, COMPUTE).clone()
                for first, _, direction in self._directions(name, partition, adamw, clip):
                    piece = moved[first : first + len(direction)]
                    step = direction.mul_(scale).to(piece.device)
                    piece.copy_(_added(piece, step, partition.share.start + first))
                partition.set_compute(moved)
            yield
        finally:
            for name, partition in parts:
                start = masters[name] if partition.is_master else read_share(partition, MASTER)
                partition.set_compute(start)

    def _directions(
        self, name: str, partition: Partition, adamw: GuardedAdamW, clip: float
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First element, average, and average over AdamW's divisor (float32), a chunk at a time."""
        kept, updates = self.share(name, len(partition.share)), adamw.updates
        second = read_share(partition, MOMENTS[1]) if updates else kept
        first = 0
        for chunk, exp_avg_sq in _chunks(kept, second):
            clipped = chunk.to(exp_avg_sq.device).float() * clip
            divisor = adamw.divisor(exp_avg_sq if updates else None, clipped, updates)
            yield first, chunk, chunk.float() / divisor.to(chunk.device)
            first += len(chunk)

    def _norm(self, tensors: Iterable[Tensor]) -> float:
        """Of tensors whose parts the ranks have; a collective."""
        pieces = (piece for tensor in tensors for (piece,) in _chunks(tensor))
        return math.sqrt(self._summed(piece.float().square() for piece in pieces))

    def _summed(self, pieces: Iterable[Tensor]) -> float:
        """All elements of chunks, over all ranks; a collective."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for piece in pieces:
            # Float32 is enough for as few numbers as a CPU's chunk has, and faster there.
            total += piece.sum(dtype=torch.float64 if piece.is_cuda else None).to(self._device)
        return collectives.sum_named({"total": total})["total"]


def compute_weights(parts: Named) -> dict[str, Tensor]:
    """This rank's shares of the compute weights, copied."""
    return {name: read_share(partition, COMPUTE).clone() for name, partition in parts}


def _added(weights: Tensor, step: Tensor, first: int) -> Tensor:
    """`weights` plus `step` (float32), as the weights' dtype has it.

    Steps are often smaller than half the distance of two bfloat16 numbers, where rounding to the
    nearest would undo them. A pattern over the elements rounds some up and some down: a number is
    left where it was if its step is 0, and the steps' mean comes out right.

    Args:
        first: the place of the first element in the whole parameter.
    """
    moved = step.add_(weights)
    if weights.dtype != torch.bfloat16:
        return moved
    first %= 1 << 16  # the pattern's period
    place = torch.arange(first, first + len(moved), dtype=torch.int32, device=moved.device)
    # The product may overflow: its last 16 bits are right all the same.
    pattern = (place * _GOLDEN).bitwise_and_((1 << 16) - 1)
    return moved.view(torch.int32).add_(pattern).bitwise_and_(-(1 << 16)).view(torch.float32)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same pieces of 1-D tensors, small enough that temporaries of them do not count."""
    size = _CHUNK_CUDA if any(t.is_cuda for t in tensors) else _CHUNK
    return zip(*(t.split(size) for t in tensors), strict=True)
