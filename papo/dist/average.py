"""A running average of gradients, kept beside AdamW's moments, and steps along it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

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
_CHUNK = 1 << 18
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
        gradients = {name: read_share(partition, GRADIENT) for name, partition in parts}
        # In float32 a chunk at a time, as all sums here: of many millions it would lose 3 digits.
        pieces = [piece for g in gradients.values() for (piece,) in _chunks(g)]
        square = sum(torch.linalg.vector_norm(piece).double().square() for piece in pieces)
        norm = math.sqrt(collectives.sum_named({"square": square})["square"])
        if not math.isfinite(norm):
            return norm
        self.count += 1
        weight = (1 - decay) / (1 - decay**self.count)  # keeps the bias corrected
        for name, gradient in gradients.items():
            for kept, new in _chunks(self.share(name, len(gradient)), gradient):
                kept.copy_(kept.float().lerp_(new.to(kept.device), weight))
        return norm

    def dot_last_change(self, parts: Named, adamw: GuardedAdamW, *, applied: bool) -> float:
        """Inner product with what the last update added to all weights; a collective.

        Args:
            applied: whether it changed them; else NaN.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        updates = adamw.updates
        for name, partition in parts if applied else ():
            state = [read_share(partition, kind) for kind in (MASTER, *MOMENTS)]
            for kept, master, first, second in _chunks(self._shares[name], *state):
                change = adamw.last_change(master, first, second, updates).to(kept.device)
                total += change.mul_(kept).sum()
        # Every rank sums, whatever it found.
        product = collectives.sum_named({"product": total})["product"]
        return product if applied else math.nan

    @contextlib.contextmanager
    def moved(self, parts: Named, adamw: GuardedAdamW, change: float) -> Iterator[None]:
        """Compute weights inside are moved along the average, divided as AdamW would; a collective.

        Args:
            change: inner product of average and move, where the average is not 0.
        """
        product = torch.zeros((), dtype=torch.float64, device=self._device)
        for name, partition in parts:
            for _, kept, direction in self._directions(name, partition, adamw):
                product += direction.mul_(kept).sum()
        length = collectives.sum_named({"product": product})["product"]
        scale = change / length if length else 0.0
        start = {name: read_share(partition, COMPUTE).clone() for name, partition in parts}
        try:
            for name, partition in parts:
                moved = start[name].clone()
                for first, _, direction in self._directions(name, partition, adamw):
                    piece = moved[first : first + len(direction)]
                    step = direction.mul_(scale).to(piece.device)
                    piece.copy_(_added(piece, step, partition.share.start + first))
                partition.set_compute(moved)
            yield
        finally:
            for name, partition in parts:
                partition.set_compute(start[name])

    def _directions(
        self, name: str, partition: Partition, adamw: GuardedAdamW
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First element, average, and average over AdamW's divisor (float32), a chunk at a time."""
        updates = adamw.updates
        kept = self.share(name, len(partition.share))
        second = read_share(partition, MOMENTS[1]) if updates else kept
        for i, (chunk, exp_avg_sq) in enumerate(_chunks(kept, second)):
            divisor = adamw.divisor(exp_avg_sq, updates).to(chunk.device) if updates else 1.0
            yield i * _CHUNK, chunk, chunk.float() / divisor


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
    pattern = (place * _GOLDEN).bitwise_and_((1 << 16) - 1)
    return moved.view(torch.int32).add_(pattern).bitwise_and_(-(1 << 16)).view(torch.float32)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same pieces of 1-D tensors, small enough that temporaries of them do not count."""
    return zip(*(t.split(_CHUNK) for t in tensors), strict=True)
