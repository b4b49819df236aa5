"""The sampling rounds of a step: the next problems, their completions, their rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from papo.config import TrainConfig
from papo.data.problems import ProblemSource
from papo.dist import collectives
from papo.policy.advantage import ScoredGroup, score_groups
from papo.record.telemetry import StageClock
from papo.reward.pool import RewardPool
from papo.rollout import HFSampler, SamplingParams
from papo.train.schedule import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class SamplingRounds:
    """Samples and scores this rank's share of one round after the other.

    Attributes:
        model: whole weights (engine.inference_model).
        clock: counts the seconds.
        step: number of finished steps, which the seeds depend on.
        cursor: of the data; moves on with each round.
        done: number of finished rounds.
    """

    config: TrainConfig
    problems: ProblemSource
    sampler: HFSampler
    rewards: RewardPool
    model: PreTrainedModel
    clock: StageClock
    step: int
    cursor: int
    done: int = 0

    def next(self) -> list[ScoredGroup]:
        """Sample and score another round; a collective."""
        config, rollout = self.config, self.config.rollout
        n, prompts = rollout.completions_per_prompt, rollout.prompts_per_step
        problems = self.problems.batch(self.cursor, prompts)
        self.cursor += prompts
        # Every rank has a share of every part of the round, which mini-batches are made of.
        mine = range(collectives.rank(), prompts, collectives.world_size())
        with self.clock("rollout"), collectives.failing_together():
            seeds = [seed_of(config.seed, "rollout", self.step, self.done, i) for i in mine]
            params = SamplingParams.of(rollout)
            share = [problems[i] for i in mine]
            completions = self.sampler.sample(self.model, share, n, params, seeds)
        with self.clock("reward"), collectives.failing_together():
            rewards = self.rewards.score(completions)
        indices = [self.done * prompts + i for i in mine]
        self.done += 1
        return score_groups(completions, rewards, indices, config.advantage, rollout.max_new_tokens)
