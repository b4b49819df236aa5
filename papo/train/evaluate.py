"""Accuracy and reward on the held-out problems: sampled (mean over k completions and pass@k) and
greedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from papo.dist import collectives
from papo.rollout.hf import SamplingParams, greedy
from papo.types import Completion, Problem, Reward

Score = Callable[[Sequence[Completion]], list[Reward]]


def evaluate(
    model: Any,
    sampler: Any,
    problems: Sequence[Problem],
    params: SamplingParams,
    score: Score,
    *,
    samples: int,
    with_greedy: bool,
    success: float,
    seed: int,
) -> dict[str, float]:
    """Figures over all ranks' problems; a collective, though ranks sample without talking.

    Masked completions count neither as right nor as wrong: they are left out of every mean, and a
    problem whose samples are all masked is left out of pass@k.

    Args:
        model: whole weights (engine.inference_model).
        params: sampling parameters of the run; temperature 1 and no truncation are used for the
            sampled figure, so that runs with different rollout settings compare.
        success: the reward from which a completion counts as right.

    Returns:
        Shares and means over what was scored, absent where nothing was:
        `accuracy` and `reward` (means over the samples), `pass_at_k` (any of a problem's samples is
        right), `greedy` and `reward_greedy` where asked for, `truncated` (share of sampled
        completions that ran into the limit), `invalid` (masked completions), `problems`.
    """
    rank, world = collectives.rank(), collectives.world_size()
    share = list(problems[rank::world])
    plain = replace(params, temperature=1.0, top_p=1.0, top_k=0)
    sampled, best, solved = [0.0] * 4, [0.0] * 4, [0.0] * 4
    truncated = 0
    with collectives.failing_together():
        if share:
            completions = sampler.sample(model, share, samples, plain, seed)
            rewards = score(completions)
            sampled = _tally(rewards, success)
            # A problem's best sample stands for it: NaN, masked, where none has a reward.
            groups = (rewards[i : i + samples] for i in range(0, len(rewards), samples))
            solved = _tally([max(g, key=_size) for g in groups], success)
            truncated = sum(c.truncated for c in completions)
            if with_greedy:
                best = _tally(score(sampler.sample(model, share, 1, greedy(params), seed)), success)
    sums = torch.tensor([sampled, solved, best, [truncated, len(share), 0, 0]], dtype=torch.float64)
    sampled, solved, best, (truncated, count, *_) = collectives.all_sum(sums).tolist()
    figures = {"invalid": sampled[3] + best[3], "problems": count}
    if count:
        figures["truncated"] = truncated / (count * samples)
    if sampled[0]:
        figures["accuracy"] = sampled[1] / sampled[0]
        figures["pass_at_k"] = solved[1] / solved[0]
        figures["reward"] = sampled[2] / sampled[0]
    if best[0]:
        figures["greedy"] = best[1] / best[0]
        figures["reward_greedy"] = best[2] / best[0]
    return figures


def _tally(rewards: Sequence[Reward], success: float) -> list[float]:
    """Rewards that are numbers, those that succeed, their sum, and the masked ones."""
    values = [r.value for r in rewards if math.isfinite(r.value)]
    right = sum(r.succeeds(success) for r in rewards)
    return [float(len(values)), float(right), math.fsum(values), float(len(rewards) - len(values))]


def _size(reward: Reward) -> float:
    return reward.value if math.isfinite(reward.value) else -math.inf
