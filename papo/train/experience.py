"""One step's experience: scored groups, dynamic sampling and the sequences the loss trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from papo.dist import collectives
from papo.errors import PapoError
from papo.policy.advantage import (
    group_advantages,
    masked_counts,
    overlong_penalty,
    sequence_token_weights,
)
from papo.policy.batch import TrainingSequence
from papo.types import Completion, Reward


@dataclass(frozen=True)
class ScoredGroup:
    """The completions of one prompt with their rewards and advantages.

    `used[i]` is False for a row that trains nothing: its reward was not a number, or it was cut off
    and `advantage.overlong` is `mask`. `zero_spread`: all rewards equal, so every advantage is 0.
    """

    completions: tuple[Completion, ...]
    rewards: tuple[Reward, ...]
    shaped: tuple[float, ...]
    advantages: tuple[float, ...]
    used: tuple[bool, ...]
    zero_spread: bool


def score_groups(
    completions: Sequence[Completion],
    rewards: Sequence[Reward],
    completions_per_prompt: int,
    advantage: Any,
    max_new_tokens: int,
) -> list[ScoredGroup]:
    """Rewards to advantages, group by group; `completions` holds whole groups one behind the other.

    Args:
        advantage: the config's `advantage` section.
    """
    if not completions:
        return []
    n = completions_per_prompt
    raw = torch.tensor([r.value for r in rewards], dtype=torch.float32)
    if advantage.overlong == "soft":
        lengths = torch.tensor([len(c.response_ids) for c in completions])
        raw = raw + overlong_penalty(lengths, max_new_tokens, advantage.overlong_buffer)
    shaped = raw.view(-1, n)
    scored = group_advantages(shaped, normalize_std=advantage.normalize_std)
    groups = []
    for g in range(shaped.shape[0]):
        part = slice(g * n, (g + 1) * n)
        members = tuple(completions[part])
        dropped = [advantage.overlong == "mask" and c.truncated for c in members]
        groups.append(
            ScoredGroup(
                completions=members,
                rewards=tuple(rewards[part]),
                shaped=tuple(shaped[g].tolist()),
                advantages=tuple(scored.advantages[g].tolist()),
                used=tuple(
                    bool(v) and not d
                    for v, d in zip(scored.valid[g].tolist(), dropped, strict=True)
                ),
                zero_spread=bool(scored.zero_spread[g]),
            )
        )
    return groups


@dataclass(frozen=True)
class Collected:
    """`groups`: what this rank trains on; `sampled`: all it sampled; `rounds` of sampling."""

    groups: list[ScoredGroup]
    sampled: list[ScoredGroup]
    rounds: int


def collect(
    sample_round: Callable[[int], list[ScoredGroup]], wanted: int, dynamic: Any
) -> Collected:
    """Sample once, or until `wanted` groups over all ranks have spread; a collective.

    Which groups are kept is decided on what all ranks report, so every rank runs the same number of
    rounds even when one of them keeps nothing.

    Args:
        sample_round: this rank's share of round k.
        wanted: groups per step over all ranks.
        dynamic: the config's `dynamic_sampling` section.

    Raises:
        PapoError: too few groups after `max_rounds` and `on_exhausted` is `error`.
    """
    sampled = sample_round(0)
    if not dynamic.enabled:
        return Collected(sampled, sampled, 1)
    kept = [g for g in sampled if not g.zero_spread]
    rounds = 1
    while sum(collectives.gather_objects(len(kept))) < wanted and rounds < dynamic.max_rounds:
        fresh = sample_round(rounds)
        sampled = sampled + fresh
        kept += [g for g in fresh if not g.zero_spread]
        rounds += 1
    counts = collectives.gather_objects(len(kept))
    if sum(counts) < wanted:
        if dynamic.on_exhausted == "error":
            raise PapoError(
                f"dynamic sampling: {sum(counts)} of {wanted} groups have mixed rewards after "
                f"{rounds} rounds; raise dynamic_sampling.max_rounds, choose easier data, or set "
                "dynamic_sampling.on_exhausted=train_smaller"
            )
        if dynamic.on_exhausted == "skip":
            kept = []
        return Collected(kept, sampled, rounds)
    return Collected(kept[: _fair_share(counts, wanted)[collectives.rank()]], sampled, rounds)


def _fair_share(counts: Sequence[int], wanted: int) -> list[int]:
    """How many groups each rank keeps: the surplus is taken from the ranks that have most."""
    keep = list(counts)
    while sum(keep) > wanted:
        keep[keep.index(max(keep))] -= 1
    return keep


def to_sequences(groups: Sequence[ScoredGroup]) -> list[TrainingSequence]:
    """The rows that train, of weight 1 until `with_token_weights` sets the normaliser."""
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


def with_token_weights(sequences: Sequence[TrainingSequence], loss: Any) -> list[TrainingSequence]:
    """Set every sequence's token weight from the counts of the global batch; a collective."""
    lengths = torch.tensor([len(s.response_ids) for s in sequences], dtype=torch.float64)
    mask = torch.ones(len(sequences), dtype=torch.bool)
    tokens, count = collectives.all_sum(masked_counts(lengths, mask)).tolist()
    weights = sequence_token_weights(
        lengths,
        mask,
        aggregation=loss.aggregation,
        constant_length=loss.constant_length,
        global_tokens=tokens,
        global_sequences=count,
    )
    return [replace(s, weight=w) for s, w in zip(sequences, weights.tolist(), strict=True)]


def mini_batches(
    sequences: Sequence[TrainingSequence], updates: int
) -> list[list[TrainingSequence]]:
    """`sequences` in `updates` parts of nearly equal numbers of whole groups, in order."""
    order = list(dict.fromkeys(s.group for s in sequences))
    part = {g: i * updates // max(1, len(order)) for i, g in enumerate(order)}
    return [[s for s in sequences if part[s.group] == u] for u in range(updates)]
