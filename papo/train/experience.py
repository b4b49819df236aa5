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
        """This rank's share of another round; its groups' indices come after those before."""


@dataclass(frozen=True)
class Collected:
    """`groups`: what this rank trains on; `sampled`: all it sampled; `rounds` of sampling."""

    groups: list[ScoredGroup]
    sampled: list[ScoredGroup]
    rounds: int


def collect(rounds: Rounds, wanted: int, dynamic: DynamicSamplingConfig) -> Collected:
    """Sample once, or until `wanted` groups over all ranks have spread; a collective.

    The first `wanted` groups with spread are kept, in the order of their indices: how many ranks
    share the groups changes nothing. Every rank runs the same number of rounds, even where it
    keeps nothing.

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
    found, count = _with_spread(sampled), 1
    while len(found) < wanted and count < dynamic.max_rounds:
        fresh = rounds.next()
        sampled = sampled + fresh
        found += _with_spread(fresh)
        count += 1
    if len(found) < wanted:
        if dynamic.on_exhausted == "error":
            raise PapoError(
                f"dynamic sampling: {len(found)} of {wanted} groups have mixed rewards after "
                f"{count} rounds; raise dynamic_sampling.max_rounds, choose easier data, or set "
                "dynamic_sampling.on_exhausted=train_smaller"
            )
        if dynamic.on_exhausted == "skip":
            found = []
    return Collected(_share(sampled, found[:wanted]), sampled, count)


def _with_spread(groups: Sequence[ScoredGroup]) -> list[tuple[int, int]]:
    """Index and rank of all ranks' groups that have spread, in order; a collective."""
    rank = collectives.rank()
    return sorted(collectives.gather_lists([(g.index, rank) for g in groups if not g.zero_spread]))


def _share(sampled: Sequence[ScoredGroup], kept: Sequence[tuple[int, int]]) -> list[ScoredGroup]:
    """The groups that this rank trains on; a collective.

    One rank may have sampled many more of the `kept` groups than another, which would wait for it:
    groups move from rank to rank.

    Args:
        sampled: by this rank.
        kept: index and rank of the groups that train, over all ranks.
    """
    own = {g.index: g for g in sampled}
    shares: list[list[ScoredGroup]] = [[] for _ in range(collectives.world_size())]
    takers = takers_of([rank for _, rank in kept], len(shares))
    for (index, rank), taker in zip(kept, takers, strict=True):
        if rank == collectives.rank():
            shares[taker].append(own[index])
    stay, shares[collectives.rank()] = shares[collectives.rank()], []
    return sorted([*stay, *collectives.exchange(shares)], key=lambda group: group.index)


def takers_of(holders: Sequence[int], world: int) -> list[int]:
    """The rank that trains on each group, where `holders` have sampled them.

    Of every `world` groups in a row each rank takes one, so that it also has its share of every
    part that `mini_batches` makes; it is one of its own where there is one.
    """
    takers: list[int] = []
    for start in range(0, len(holders), world):
        part = holders[start : start + world]
        free = [r for r in range(world) if r not in part]
        for i, holder in enumerate(part):
            takers.append(free.pop(0) if holder in part[:i] else holder)
    return takers


def to_sequences(groups: Sequence[ScoredGroup]) -> list[TrainingSequence]:
    """The rows that train, of weight 1 until `with_token_weights` sets the normalizer."""
    return [
        TrainingSequence(
            prompt_ids=c.problem.prompt_ids,
            response_ids=c.response_ids,
            sampler_logp=c.sampler_logp,
            advantage=advantage,
            weight=1.0,
            group=group.index,
            kept=c.kept,
        )
        for group in groups
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
    """This rank's `sequences` in `updates` parts; a collective.

    The groups of all ranks that train are cut, in order, into parts of nearly equal numbers of
    whole groups: how many ranks share the groups changes nothing.
    """
    order = sorted(collectives.gather_lists({s.group for s in sequences}))
    part = {g: i * updates // max(1, len(order)) for i, g in enumerate(order)}
    return [[s for s in sequences if part[s.group] == u] for u in range(updates)]
