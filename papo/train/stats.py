"""A policy's passes without gradient over a rank's sequences: what the loss needs of the old and of
the reference policy, and the mean entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from papo.dist import collectives
from papo.policy.batch import Batcher, TrainingSequence, micro_batches
from papo.policy.passes import MovableEngine, evaluating, stats_of
from papo.policy.weighting import WeightController
from papo_kernels import TokenStats

Pieces = Sequence[Sequence[TrainingSequence]]

# Nats of mean entropy that the weights are moved by for shared polarity, and the most of it as a
# part of the mean entropy. Log-probs bend over more; less drowns in how bfloat16 rounds
# activations.
SHARED_CHANGE, SHARED_CHANGE_BF16 = 0.1, 0.5
SHARED_PART = 1 / 3


@dataclass(frozen=True)
class Passes:
    """Runs `engine` over sequences, a micro-batch at a time.

    Attributes:
        size: sequences of a micro-batch.
    """

    engine: MovableEngine
    batcher: Batcher
    size: int

    def pieces(self, sequences: Sequence[TrainingSequence]) -> Pieces:
        """`sequences` in micro-batches, as many on every rank and at least one; a collective."""
        mine = -(-len(sequences) // self.size)
        count = max(1, int(collectives.all_max(mine)))
        return list(micro_batches(sequences, self.size, count=count))

    def token_stats(self, sequences: Sequence[TrainingSequence]) -> list[TokenStats]:
        """Statistics of each sequence's tokens, float32 on the CPU; a collective."""
        per_sequence: list[TokenStats] = []
        with evaluating(self.engine):
            for piece in self.pieces(sequences):
                stats = stats_of(self.engine, self.batcher.batch(piece))
                if piece[0].group < 0:  # idle
                    continue
                lengths = [len(s.response_ids) for s in piece]
                columns = [column.cpu().split(lengths) for column in stats]
                per_sequence += [TokenStats(*parts) for parts in zip(*columns, strict=True)]
        return per_sequence

    def shared_unit_polarity(
        self, sequences: Sequence[TrainingSequence], stats: Sequence[TokenStats]
    ) -> list[Tensor]:
        """How far each token's log-prob rises per nat that the mean entropy rises, where weights
        move along the engine's kept average, scaled as by AdamW; a collective.

        It is also the change of the mean entropy by an update that raises this log-prob alone, but
        for a factor that all tokens have in common (docs/method.md).

        Args:
            stats: the sequences', at the present weights.

        Returns:
            float32 [T] of each sequence, on the CPU.
        """
        sums = {"tokens": 0.0, "entropy": 0.0}
        for sequence, here in zip(sequences, stats, strict=True):
            if sequence.weight > 0:
                sums["tokens"] += len(here.entropy)
                sums["entropy"] += float(here.entropy.double().sum())
        total = collectives.sum_named(sums)
        most = SHARED_CHANGE_BF16 if self.engine.computes_in_bf16 else SHARED_CHANGE
        change = min(most, SHARED_PART * total["entropy"] / max(1.0, total["tokens"]))
        if not change > 0.0:
            return [torch.zeros_like(here.logp) for here in stats]
        with self.engine.moved_along_average(change):
            moved = self.token_stats(sequences)
        # A log-prob of -inf stays where it is: its gradient is 0.
        return [
            torch.where(there.logp == here.logp, 0.0, (there.logp - here.logp) / change)
            for there, here in zip(moved, stats, strict=True)
        ]

    def mean_entropy(self, pieces: Pieces) -> float:
        """Mean entropy in nats over all ranks' tokens that train, NaN where there are none; a
        collective."""
        tokens = entropy = torch.zeros((), dtype=torch.float64, device=self.batcher.device)
        with evaluating(self.engine):
            for piece in pieces:
                batch = self.batcher.batch(piece)
                each = stats_of(self.engine, batch).entropy.double()
                tokens = tokens + batch.live.double().sum()
                entropy = entropy + torch.where(batch.live, each, 0.0).sum()
        sums = collectives.sum_named({"tokens": tokens, "entropy": entropy})
        return sums["entropy"] / (sums["tokens"] or math.nan)


def attach(
    sequences: Sequence[TrainingSequence],
    old: Passes,
    reference: Passes | None,
    weighting: WeightController,
    phase: float,
    updates_per_rollout: int,
) -> list[TrainingSequence]:
    """Set what the loss needs of other policies; a collective, with passes only where needed.

    `old_logp` is set where a rollout serves several updates: a single one is on-policy, its ratio 1
    by definition. `ref_logp` is set where the KL term is on, and `factor` where the weights come
    from the old policy's polarity; `unit_polarity` with it where that is the shared one.

    Args:
        old: the policy, whose weights are still the sampler's.
        reference: None where the KL term is off.
        phase: of the weights.
    """
    result = list(sequences)
    if updates_per_rollout > 1 or weighting.from_rollout:
        stats = old.token_stats(result)
        if weighting.from_rollout:
            units = [o.unit_polarity for o in stats]
            if weighting.shared and old.engine.has_average:
                units = old.shared_unit_polarity(result, stats)
                result = [replace(s, unit_polarity=u) for s, u in zip(result, units, strict=True)]
            factors = [
                weighting.rollout_weights(s.advantage, u, phase)
                for s, u in zip(result, units, strict=True)
            ]
            result = [replace(s, factor=f) for s, f in zip(result, factors, strict=True)]
        if updates_per_rollout > 1:
            result = [replace(s, old_logp=o.logp) for s, o in zip(result, stats, strict=True)]
    if reference is not None:
        ref = reference.token_stats(result)
        result = [replace(s, ref_logp=r.logp) for s, r in zip(result, ref, strict=True)]
    return result
