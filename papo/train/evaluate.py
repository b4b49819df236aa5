"""Accuracy and reward on the held-out problems: sampled (mean over k completions and pass@k) and
greedy."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from papo.data.problems import ProblemSource
from papo.dist import collectives
from papo.record.recorder import Recorder
from papo.reward.pool import RewardPool
from papo.rollout.hf import HFSampler, SamplingParams, greedy
from papo.train.schedule import seed_of
from papo.types import Problem, Reward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from papo.dist.engine import Engine


@dataclass(frozen=True)
class Evaluator:
    """Measures a policy on problems.

    Attributes:
        params: sampling parameters of the run. The sampled figures use temperature 1 and no
            truncation instead, so that runs with different rollout settings compare.
        samples: of each problem.
        with_greedy: whether each problem is also decoded greedily.
        success: the reward from which a completion counts as right.
        seed: of the run.
    """

    sampler: HFSampler
    rewards: RewardPool
    params: SamplingParams
    samples: int
    with_greedy: bool
    success: float
    seed: int

    def evaluate(self, model: PreTrainedModel, problems: Sequence[Problem]) -> dict[str, float]:
        """Figures over all ranks' problems; a collective.

        Masked completions count neither as right nor as wrong: they are left out of every mean, and
        a problem whose samples are all masked is left out of pass@k.

        Args:
            model: whole weights (engine.inference_model).

        Returns:
            Shares and means over what was scored, absent where nothing was: `accuracy` and `reward`
            (means over the samples), `pass_at_k` (any of a problem's samples is right), `greedy`
            and `reward_greedy` where asked for, `truncated` (share of sampled completions that ran
            into the limit), `invalid` (masked completions), `problems`.
        """
        mine = range(collectives.rank(), len(problems), collectives.world_size())
        share = [problems[i] for i in mine]
        seeds = [seed_of(self.seed, "evaluation", i) for i in mine]
        sampled: list[Reward] = []
        decoded: list[Reward] = []
        truncated = 0
        with collectives.failing_together():
            if share:
                plain = replace(self.params, temperature=1.0, top_p=1.0, top_k=0)
                drawn = self.sampler.sample(model, share, self.samples, plain, seeds)
                sampled = self.rewards.score(drawn)
                truncated = sum(c.truncated for c in drawn)
                if self.with_greedy:
                    params = greedy(self.params)
                    once = self.sampler.sample(model, share, 1, params, seeds)
                    decoded = self.rewards.score(once)
        groups = (sampled[i : i + self.samples] for i in range(0, len(sampled), self.samples))
        # A problem's best sample stands for it: NaN, masked, where none has a reward.
        solved = [max(group, key=_size) for group in groups]
        sums = collectives.sum_named(
            {
                "problems": len(share),
                "truncated": truncated,
                **self._tally("samples", sampled),
                **self._tally("solved", solved),
                **self._tally("greedy", decoded),
            }
        )
        return self._figures(sums)

    def _tally(self, what: str, rewards: Sequence[Reward]) -> dict[str, float]:
        """Rewards that are numbers, those that succeed, their sum, and the masked ones."""
        values = [r.value for r in rewards if math.isfinite(r.value)]
        return {
            f"{what}/scored": len(values),
            f"{what}/right": sum(r.succeeds(self.success) for r in rewards),
            f"{what}/reward": math.fsum(values),
            f"{what}/masked": len(rewards) - len(values),
        }

    def _figures(self, sums: dict[str, float]) -> dict[str, float]:
        count, scored, decoded = sums["problems"], sums["samples/scored"], sums["greedy/scored"]
        figures = {"invalid": sums["samples/masked"] + sums["greedy/masked"], "problems": count}
        if count:
            figures["truncated"] = sums["truncated"] / (count * self.samples)
        if scored:
            figures["accuracy"] = sums["samples/right"] / scored
            figures["pass_at_k"] = sums["solved/right"] / sums["solved/scored"]
            figures["reward"] = sums["samples/reward"] / scored
        if decoded:
            figures["greedy"] = sums["greedy/right"] / decoded
            figures["reward_greedy"] = sums["greedy/reward"] / decoded
        return figures


def _size(reward: Reward) -> float:
    return reward.value if math.isfinite(reward.value) else -math.inf


@dataclass(frozen=True)
class HeldOut:
    """Evaluates a run's policy on the held-out problems and has it recorded."""

    evaluator: Evaluator
    engine: Engine
    problems: ProblemSource
    recorder: Recorder

    def evaluate(self, label: str, step: int) -> None:
        """Measure, keep and show the held-out accuracy; a collective."""
        begin = time.perf_counter()
        held_out, samples = self.problems.held_out(), self.evaluator.samples
        self.recorder.say(f"evaluating {label}: {len(held_out)} problems, {samples} samples each")
        with self.engine.inference_model() as model:
            figures = self.evaluator.evaluate(model, held_out)
        self.recorder.evaluation(label, step, figures, time.perf_counter() - begin)
