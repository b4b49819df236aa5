"""One step's experience: dynamic sampling, and from scored groups to the sequences that train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from papo.dist import collectives
from papo.errors import PapoError
from papo.policy.advantage import ScoredGroup
from papo.policy.batch import TrainingSequence
from papo.policy.objective import token_weights

if TYPE_CHECKING:
    from papo.config import DynamicSamplingConfig, LossConfig


class Rounds(Protocol):
    """What dynamic sampling draws on: `papo.train.rounds.SamplingRounds`."""

    def next(self) -> list[ScoredGroup]:
        """This rank's share of another round."""


@dataclass(frozen=True)
class Collected:
    """`groups`: what this rank trains on; `sampled`: all it sampled; `rounds` of sampling."""

    groups: list[ScoredGroup]
    sampled: list[ScoredGroup]
    rounds: int


def collect(rounds: Rounds, wanted: int, dynamic: DynamicSamplingConfig) -> Collected:
    """Sample once, or until `wanted` groups over all ranks have spread; a collective.

    Which groups are kept is decided on what all ranks report. So every rank runs the same number
    of rounds, even where one of them keeps nothing.

    Args:
        rounds: no more of them are drawn than are needed.
        wanted: groups per step over all ranks.
        dynamic: the config's `dynamic_sampling` section.

    Raises:
        PapoError: too few groups after `max_rounds` and `on_exhausted` is `error`.
    """
    sampled = rounds.next()
    if not dynamic.enabled:
        return Collected(sampled, sampled, 1)
    kept = [g for g in sampled if not g.zero_spread]
    count = 1
    while sum(collectives.gather_objects(len(kept))) < wanted and count < dynamic.max_rounds:
        fresh = rounds.next()
        sampled = sampled + fresh
        kept += [g for g in fresh if not g.zero_spread]
        count += 1
    counts = collectives.gather_objects(len(kept))
    if sum(counts) < wanted:
        if dynamic.on_exhausted == "error":
            raise PapoError(
                f"dynamic sampling: {sum(counts)} of {wanted} groups have mixed rewards after "
                f"{count} rounds; raise dynamic_sampling.max_rounds, choose easier data, or set "
                "dynamic_sampling.on_exhausted=train_smaller"
            )
        if dynamic.on_exhausted == "skip":
            kept = []
        return Collected(kept, sampled, count)
    return Collected(kept[: _fair_share(counts, wanted)[collectives.rank()]], sampled, count)


def _fair_share(counts: Sequence[int], wanted: int) -> list[int]:
    """How many groups each rank keeps: the surplus is taken from the ranks that have most."""
    keep = list(counts)
    while sum(keep) > wanted:
        keep[keep.index(max(keep))] -= 1
    return keep


def to_sequences(groups: Sequence[ScoredGroup]) -> list[TrainingSequence]:
    """The rows that train, of weight 1 until `with_token_weights` sets the normalizer."""
    return [
        TrainingSequence(
            prompt_ids=c.problem.prompt_ids,
            response_ids=c.response_ids,
            sampler_logp=c.sampler_logp,
            advantage=advantage,
            weight=1.0,
            group=g,
            kept=c.kept,
        )
        for g, group in enumerate(groups)
        for c, advantage, used in zip(group.completions, group.advantages, group.used, strict=True)
        if used
    ]


def with_token_weights(
    sequences: Sequence[TrainingSequence], loss: LossConfig
) -> list[TrainingSequence]:
    """Set every sequence's token weight from the counts of the global batch; a collective."""
    lengths = torch.tensor([len(s.response_ids) for s in sequences], dtype=torch.float64)
    counts = collectives.sum_named(
        {"global_tokens": lengths.sum(), "global_sequences": (lengths > 0).double().sum()}
    )
    weights = token_weights(lengths, loss, **counts)
    return [replace(s, weight=w) for s, w in zip(sequences, weights.tolist(), strict=True)]


def mini_batches(
    sequences: Sequence[TrainingSequence], updates: int
) -> list[list[TrainingSequence]]:
    """`sequences` in `updates` parts of nearly equal numbers of whole groups, in order."""
    order = list(dict.fromkeys(s.group for s in sequences))
    part = {g: i * updates // max(1, len(order)) for i, g in enumerate(order)}
    return [[s for s in sequences if part[s.group] == u] for u in range(updates)]
