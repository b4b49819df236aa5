"""The mean entropy's change by an update, measured on the same tokens before and after it, and the
gradient that predicts it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from papo.dist import collectives
from papo.policy.batch import TrainingSequence
from papo.policy.passes import evaluating, stats_of
from papo.policy.update import Update
from papo.train.stats import Passes, Pieces
from papo.train.step import TrainingEngine

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
        total = collectives.sum_named({"tokens": sum(len(s.response_ids) for s in sequences)})
        share = tokens / max(1.0, total["tokens"])
        if tokens and share < 1:
            pieces = passes.pieces(share_of(sequences, share))
        elif not passes.engine.dropout:
            return cls(passes, pieces)
        return cls(passes, pieces, passes.mean_entropy(pieces))

    def measure(self, update: Update) -> Update:
        """`update` with the change it made; as it is where it was skipped. A collective."""
        if not update.applied:
            return update
        before = update.sums.mean(update.sums.entropy) if self.before is None else self.before
        return replace(update, measured_delta=self.passes.mean_entropy(self.pieces) - before)


@dataclass(frozen=True)
class EntropyGradient:
    """The gradient of the mean entropy, averaged over the steps in the engine.

    It is nearly the same from batch to batch, so that a few completions of each will do.

    Attributes:
        share: of the completions, in (0, 1]; taken from every part of the batch.
        decay: of the average.
    """

    engine: TrainingEngine
    passes: Passes
    share: float
    decay: float

    def take(self, sequences: Sequence[TrainingSequence]) -> float:
        """Fold the gradient at the present weights into the average; a collective.

        The weights, AdamW's state and the random numbers of training stay as they are.

        Args:
            sequences: this rank's.

        Returns:
            The norm of this gradient, in nats per unit of weight; NaN where no completion trains.
        """
        taken = share_of([s for s in sequences if s.weight > 0], self.share)
        mine = sum(len(s.response_ids) for s in taken)
        tokens = collectives.sum_named({"tokens": mine})["tokens"]
        if not tokens:
            return math.nan
        pieces = self.passes.pieces(taken)
        with evaluating(self.engine) if self.engine.dropout else contextlib.nullcontext():
            for i, piece in enumerate(pieces):
                batch = self.passes.batcher.batch(piece)
                entropy = stats_of(self.engine, batch, gradient=True).entropy
                mean = torch.where(batch.live, entropy, 0.0).sum() / tokens
                self.engine.backward(mean, last=i == len(pieces) - 1)
        return self.engine.average_gradient(self.decay)


def share_of(sequences: Sequence[TrainingSequence], share: float) -> list[TrainingSequence]:
    """This rank's part of a share of all ranks' `sequences`; a collective.

    How many ranks share the sequences does not change which of them are taken.
    """
    mine = [(s.group, i, len(s.response_ids)) for i, s in enumerate(sequences)]
    chosen = set(spread(sorted(collectives.gather_lists(mine)), share))
    return [s for place, s in zip(mine, sequences, strict=True) if place in chosen]


def spread(items: Sequence[T], share: float) -> list[T]:
    """A share of `items`, rounded up, at equal distances from the first to the last."""
    n = len(items)
    count = math.ceil(share * n)
    return [items[(2 * i + 1) * n // (2 * count)] for i in range(count)]
