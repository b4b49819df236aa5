"""Accuracy on the held-out problems: sampled (mean over k completions and pass@k) and greedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from papo import collectives
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
    seed: int,
) -> dict[str, float]:
    """Accuracies over all ranks' problems; a collective, though ranks sample without talking.

    Args:
        model: whole weights (engine.inference_model).
        params: sampling parameters of the run; temperature 1 and no truncation are used for the
            sampled figure, so that runs with different rollout settings compare.

    Returns:
        `accuracy` (mean over problems and samples), `pass_at_k` (any of the samples), `greedy`
        where asked for, `truncated` (share of sampled completions that ran into the limit),
        `problems`.
    """
    rank, world = collectives.rank(), collectives.world_size()
    share = list(problems[rank::world])
    plain = replace(params, temperature=1.0, top_p=1.0, top_k=0)
    sums = torch.zeros(5, dtype=torch.float64)
    with collectives.failing_together():
        if share:
            completions = sampler.sample(model, share, samples, plain, seed)
            right = torch.tensor([_correct(r) for r in score(completions)], dtype=torch.float64)
            right = right.view(len(share), samples)
            sums[0], sums[1] = right.sum(), right.amax(dim=1).sum()
            sums[2] = sum(c.truncated for c in completions)
            if with_greedy:
                best = sampler.sample(model, share, 1, greedy(params), seed)
                sums[3] = sum(_correct(r) for r in score(best))
            sums[4] = len(share)
    total = collectives.all_sum(sums)
    count = max(1.0, float(total[4]))
    figures = {
        "accuracy": float(total[0]) / (count * samples),
        "pass_at_k": float(total[1]) / count,
        "truncated": float(total[2]) / (count * samples),
        "problems": float(total[4]),
    }
    if with_greedy:
        figures["greedy"] = float(total[3]) / count
    return figures


def _correct(reward: Reward) -> float:
    return float(reward.value >= 1.0)
