"""How much an update changed the mean entropy, measured on the same tokens before and after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from papo.dist import collectives
from papo.policy.batch import TrainingSequence
from papo.policy.update import Update
from papo.train.stats import Passes, Pieces


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

        Args:
            pieces: the update's.
        """
        sequences = [s for piece in pieces for s in piece if s.weight > 0]
        mine = {"tokens": sum(len(s.response_ids) for s in sequences)}
        share = tokens / max(1.0, collectives.sum_named(mine)["tokens"])
        if tokens and share < 1:
            pieces = passes.pieces(spread(sequences, share))
        elif not passes.engine.dropout:
            return cls(passes, pieces)
        return cls(passes, pieces, passes.mean_entropy(pieces))

    def measure(self, update: Update) -> Update:
        """`update` with the change it made; as it is where it was skipped. A collective."""
        if not update.applied:
            return update
        before = update.sums.mean(update.sums.entropy) if self.before is None else self.before
        return replace(update, measured_delta=self.passes.mean_entropy(self.pieces) - before)


def spread(sequences: Sequence[TrainingSequence], share: float) -> list[TrainingSequence]:
    """A share of `sequences`, rounded up, at equal distances from the first to the last."""
    n = len(sequences)
    count = math.ceil(share * n)
    return [sequences[(2 * i + 1) * n // (2 * count)] for i in range(count)]
