"""How much an update changed the mean entropy, measured on the same tokens before and after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from papo.dist import collectives
from papo.policy.update import Update
from papo.train.stats import Passes, Pieces

T = TypeVar("T")


@dataclass(frozen=True)
class EntropyMeasurement:
    """Micro-batches whose entropy is measured again after the update.

    Before and after are passes over the same rows of the same shapes: a difference comes from the
    weights, and not from a product's rounding.

    Attributes:
        pieces: as many on every rank.
        before: mean entropy of their tokens before the update, in nats over all ranks. None where
            the update's own forward pass measures it: the pieces are its own, and dropout is off.
    """

    passes: Passes
    pieces: Pieces
    before: float | None = None

    @classmethod
    def of(cls, passes: Passes, pieces: Pieces, tokens: int) -> EntropyMeasurement:
        """For about `tokens` tokens of all ranks, 0 for all of the update's; a collective.

        How many ranks share the update's sequences does not change which of them are measured.

        Args:
            pieces: the update's.
        """
        sequences = [s for piece in pieces for s in piece if s.weight > 0]
        mine = [(s.group, i, len(s.response_ids)) for i, s in enumerate(sequences)]
        everyones = sorted(collectives.gather_lists(mine))
        share = tokens / max(1, sum(length for _, _, length in everyones))
        if tokens and share < 1:
            chosen = set(spread(everyones, share))
            pieces = passes.pieces(
                [s for place, s in zip(mine, sequences, strict=True) if place in chosen]
            )
        elif not passes.engine.dropout:
            return cls(passes, pieces)
        return cls(passes, pieces, passes.mean_entropy(pieces))

    def measure(self, update: Update) -> Update:
        """`update` with the change it made; as it is where it was skipped. A collective."""
        if not update.applied:
            return update
        before = update.sums.mean(update.sums.entropy) if self.before is None else self.before
        return replace(update, measured_delta=self.passes.mean_entropy(self.pieces) - before)


def spread(items: Sequence[T], share: float) -> list[T]:
    """A share of `items`, rounded up, at equal distances from the first to the last."""
    n = len(items)
    count = math.ceil(share * n)
    return [items[(2 * i + 1) * n // (2 * count)] for i in range(count)]
