"""A step's figures over all ranks under their documented names (metric_names.py); the clock."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch

from papo.dist import collectives
from papo.policy.advantage import ScoredGroup
from papo.policy.update import TokenSums, Update
from papo.record.metric_names import VERIFIER_MEAN
from papo.types import Reward

T = TypeVar("T")


class StageClock:
    """Seconds per stage of one step."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the block's duration to `stage`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin

    @contextmanager
    def entering(self, stage: str, context: AbstractContextManager[T]) -> Iterator[T]:
        """Enter `context`; only the time that entering takes is added to `stage`."""
        with ExitStack() as stack:
            with self(stage):
                value = stack.enter_context(context)
            yield value

    def metrics(self, sampled: Sequence[ScoredGroup]) -> dict[str, float]:
        """`time/<stage>` of the slowest rank, `time/step`, and the tokens sampled per second."""
        mine = {**self.seconds, "step": time.perf_counter() - self._begin}
        everyone = collectives.gather_objects(mine)
        tokens = sum(len(c.response_ids) for g in sampled for c in g.completions)
        all_tokens = collectives.sum_named({"tokens": tokens})["tokens"]
        times = {stage: max(r.get(stage, 0.0) for r in everyone) for stage in mine}
        return {
            **{f"time/{stage}": seconds for stage, seconds in times.items()},
            "throughput/tokens_per_second": all_tokens / times["step"],
        }


def rollout_metrics(
    sampled: Sequence[ScoredGroup], rounds: int, success: float
) -> dict[str, float]:
    """Rewards, lengths and groups of everything sampled, what dynamic sampling drops included; NaN
    for a mean over nothing.

    Args:
        rounds: of sampling.
        success: the reward from which a completion counts as right.
    """
    rewards = [r for g in sampled for r in g.rewards]
    finite = [r.value for r in rewards if math.isfinite(r.value)]
    completions = [c for g in sampled for c in g.completions]
    parts = _parts(rewards)
    sums = collectives.sum_named(
        {
            "scored": len(finite),
            "reward": sum(finite),
            "square": sum(v * v for v in finite),
            "right": sum(r.succeeds(success) for r in rewards),
            "groups": len(sampled),
            "zero_spread": sum(g.zero_spread for g in sampled),
            "completions": len(completions),
            "tokens": sum(len(c.response_ids) for c in completions),
            "truncated": sum(c.truncated for c in completions),
            **{s: sum(r.status == s for r in rewards) for s in ("error", "timeout", "invalid")},
            **{f"{name} given": math.fsum(values) for name, values in parts.items()},
            **{f"{name} count": len(values) for name, values in parts.items()},
        }
    )
    scored, count = sums["scored"] or math.nan, sums["completions"]
    mean = sums["reward"] / scored
    variance = sums["square"] / scored - mean * mean
    return {
        "reward/mean": mean,
        "reward/std": variance if math.isnan(variance) else math.sqrt(max(0.0, variance)),
        "reward/accuracy": sums["right"] / scored,
        "reward/zero_spread_groups": sums["zero_spread"] / sums["groups"],
        "reward/errors": sums["error"],
        "reward/timeouts": sums["timeout"],
        "reward/invalid": sums["invalid"],
        "response/length": sums["tokens"] / count,
        "response/truncated": sums["truncated"] / count,
        "rollout/rounds": rounds,
        **{
            VERIFIER_MEAN + name: sums[f"{name} given"] / (sums[f"{name} count"] or math.nan)
            for name in parts
        },
    }


def _parts(rewards: Sequence[Reward]) -> dict[str, list[float]]:
    """The numbers that each of several verifiers gave, before its weight; empty for a single one.
    Every rank has the same names."""
    names = rewards[0].parts if rewards else {}
    if len(names) < 2:
        return {}
    return {n: [r.parts[n] for r in rewards if math.isfinite(r.parts[n])] for n in names}


def update_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Loss and optimizer figures: token means over all of the step's updates, NaN without a
    token."""
    merged = TokenSums.total([u.sums for u in updates])
    last = updates[-1]
    trained = sum(u.sums.tokens > 0 for u in updates)
    return {
        "entropy/mean": merged.mean(merged.entropy),
        "loss/policy": merged.loss / (trained or math.nan),
        "loss/advantage_abs": merged.mean(merged.absolute_advantage),
        "loss/ratio": merged.mean(merged.ratio),
        "loss/clip_low": merged.mean(merged.clip_low),
        "loss/clip_high": merged.mean(merged.clip_high),
        "loss/clip_dual": merged.mean(merged.clip_dual),
        "loss/sampler_kl": merged.mean(merged.sampler_kl),
        "optim/grad_norm": last.grad_norm,
        "optim/skipped": sum(not u.applied for u in updates),
        **updates[0].branches.metrics(),
    }


def memory_metrics() -> dict[str, float]:
    """Peak memory of the largest rank in GiB: resident set, and the device's where there is one."""
    figures = {
        "memory/peak_rss": collectives.all_max(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        )
    }
    if torch.cuda.is_available():
        figures["memory/peak_device"] = collectives.all_max(
            torch.cuda.max_memory_allocated() / 2**30
        )
    return figures
