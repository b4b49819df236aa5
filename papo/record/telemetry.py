"""A step's figures over all ranks under their documented names (metric_names.py); the clock."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from papo.dist import collectives
from papo.train.experience import Collected, ScoredGroup
from papo.train.step import TokenSums, Update


class StageClock:
    """Seconds per stage of one step."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the block's duration to `stage`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin

    @contextlib.contextmanager
    def entering(self, stage: str, context: Any) -> Iterator[Any]:
        """Enter `context`, adding only the time it takes to enter to `stage`."""
        with contextlib.ExitStack() as stack:
            with self(stage):
                value = stack.enter_context(context)
            yield value

    def metrics(self, collected: Collected) -> dict[str, float]:
        """`time/<stage>` of the slowest rank, `time/step`, and the tokens sampled per second."""
        mine = {**self.seconds, "step": time.perf_counter() - self._begin}
        everyone = collectives.gather_objects(mine)
        tokens = sum(len(c.response_ids) for g in collected.sampled for c in g.completions)
        all_tokens = float(collectives.all_sum(torch.tensor([tokens])))
        times = {stage: max(r.get(stage, 0.0) for r in everyone) for stage in mine}
        return {
            **{f"time/{stage}": seconds for stage, seconds in times.items()},
            "throughput/tokens_per_second": all_tokens / times["step"],
        }


def rollout_metrics(collected: Collected, success: float) -> dict[str, float]:
    """Rewards, lengths and groups of everything sampled, what dynamic sampling drops included.

    Args:
        success: the reward from which a completion counts as right.
    """
    groups = collected.sampled
    rewards = [r for g in groups for r in g.rewards]
    finite = [r.value for r in rewards if math.isfinite(r.value)]
    completions = [c for g in groups for c in g.completions]
    sums = collectives.all_sum(
        torch.tensor(
            [
                len(finite),
                sum(finite),
                sum(v * v for v in finite),
                sum(r.succeeds(success) for r in rewards),
                len(groups),
                sum(g.zero_spread for g in groups),
                len(completions),
                sum(len(c.response_ids) for c in completions),
                sum(c.truncated for c in completions),
                *(sum(r.status == s for r in rewards) for s in ("error", "timeout", "invalid")),
            ],
            dtype=torch.float64,
        )
    ).tolist()
    scored, count, sampled = max(1.0, sums[0]), max(1.0, sums[4]), max(1.0, sums[6])
    mean = sums[1] / scored if sums[0] else math.nan
    return {
        "reward/mean": mean,
        "reward/std": math.sqrt(max(0.0, sums[2] / scored - mean * mean)) if sums[0] else math.nan,
        "reward/accuracy": sums[3] / scored if sums[0] else math.nan,
        "reward/zero_spread_groups": sums[5] / count,
        "reward/errors": sums[9],
        "reward/timeouts": sums[10],
        "reward/invalid": sums[11],
        "response/length": sums[7] / sampled,
        "response/truncated": sums[8] / sampled,
        "rollout/rounds": collected.rounds,
    }


def update_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Loss and optimizer figures: token means over all of the step's updates."""
    merged = TokenSums(
        *(sum(values) for values in zip(*(vars(u.sums).values() for u in updates), strict=True))
    )
    last = updates[-1]
    return {
        "entropy/mean": merged.mean(merged.entropy) if merged.tokens else math.nan,
        "loss/policy": merged.loss / len(updates),
        "loss/advantage_abs": merged.mean(merged.absolute_advantage),
        "loss/ratio": merged.mean(merged.ratio),
        "loss/clip_low": merged.mean(merged.clip_low),
        "loss/clip_high": merged.mean(merged.clip_high),
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


def completion_rows(groups: Sequence[ScoredGroup], first_group: int) -> list[dict[str, Any]]:
    """One row per completion for completions.jsonl."""
    return [
        {
            "group": first_group + g,
            "uid": c.problem.uid,
            "prompt": c.problem.messages[-1]["content"],
            "answer": c.problem.answer,
            "text": c.text,
            "length": len(c.response_ids),
            "truncated": c.truncated,
            "reward": None if math.isnan(r.value) else r.value,
            "status": r.status,
            "advantage": a,
        }
        for g, group in enumerate(groups)
        for c, r, a in zip(group.completions, group.rewards, group.advantages, strict=True)
    ]
