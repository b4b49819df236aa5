"""The stages in order: problems, rollout, reward, advantage, batch, stats, phase, loss, step."""

from __future__ import annotations

from typing import Any

from papo.config import TrainConfig
from papo.dist import collectives, engine
from papo.dist.termination import Termination
from papo.policy.batch import TrainingSequence
from papo.record.telemetry import StageClock, memory_metrics, rollout_metrics, update_metrics
from papo.rollout import SamplingParams
from papo.train import experience
from papo.train.schedule import due, learning_rate, seed_of
from papo.train.session import Session
from papo.train.stats import attach
from papo.train.step import Update, update


def run(config: TrainConfig) -> int:
    """Train as `config` says; 0 at the end, also after SIGTERM (with a checkpoint).

    Raises:
        PapoError: what a user can mend, on every rank.
    """
    engine.start()
    try:
        with Session(config) as session:
            return Loop(config, session).run()
    finally:
        engine.stop()


class Loop:
    """A run's position (step and data cursor) and its stages in order."""

    def __init__(self, config: TrainConfig, session: Session) -> None:
        self.config = config
        self.s = session
        self.step = 0
        self.cursor = 0
        self._termination = Termination()

    def run(self) -> int:
        """Resume, train, evaluate, report."""
        config, s = self.config, self.s
        self.step, self.cursor = s.resume()
        if self.step == 0 and config.evaluation.before:
            s.evaluate("before", self.step)
        s.progress.start(config.steps, self.step)
        stops = self._stops()
        while not stops and self.step < config.steps:
            self._train_step()
            if due(config.evaluation.every, self.step) and self.step < config.steps:
                s.evaluate(f"step {self.step}", self.step)
            stops = self._stops()
            if stops or due(config.checkpoint.every, self.step) or self.step == config.steps:
                s.save(self.step, self.cursor)
        s.progress.close()
        if stops:
            s.say(f"stopped after step {self.step}: {stops}; --resume auto continues from there")
            return 0
        s.export()
        if config.evaluation.after:
            s.evaluate("after", self.step)
        s.report()
        return 0

    def _stops(self) -> str:
        """Why a rank has to leave early, empty where none has; a collective."""
        return max(collectives.gather_objects(self._termination.reason))

    def _train_step(self) -> None:
        config, s = self.config, self.s
        clock = StageClock()
        with clock.entering("gather", s.engine.inference_model()) as model:
            collected = experience.collect(
                lambda k: self._sample_round(model, k, clock),
                config.rollout.prompts_per_step,
                config.dynamic_sampling,
            )
        phase = s.phase.phase
        updates = self._updates(experience.to_sequences(collected.groups), phase, clock)
        self.step += 1
        metrics = {
            **rollout_metrics(collected, config.reward.success),
            **update_metrics(updates),
            **s.weighting.metrics(phase),
            "phase/phi": phase,
            "optim/lr": s.engine.lr,
        }
        self._observe(updates)
        metrics |= s.prediction.observe([u.effect for u in updates if u.applied])
        metrics |= {**s.phase.metrics(), **memory_metrics(), **clock.metrics(collected)}
        s.write(self.step, metrics, collected)

    def _sample_round(self, model: Any, k: int, clock: StageClock) -> list[experience.ScoredGroup]:
        config, rollout, rank = self.config, self.config.rollout, collectives.rank()
        problems = self.s.problems.batch(self.cursor, rollout.prompts_per_step)
        self.cursor += rollout.prompts_per_step
        share = len(problems) // collectives.world_size()
        mine = problems[rank * share : (rank + 1) * share]
        n, limit = rollout.completions_per_prompt, rollout.max_new_tokens
        with clock("rollout"):
            seed = seed_of(config.seed, "rollout", self.step, k, rank)
            params = SamplingParams.of(rollout)
            completions = self.s.sampler.sample(model, mine, n, params, seed)
        with clock("reward"), collectives.failing_together():
            rewards = self.s.rewards.score(completions)
        return experience.score_groups(completions, rewards, n, config.advantage, limit)

    def _updates(
        self, sequences: list[TrainingSequence], phase: float, clock: StageClock
    ) -> list[Update]:
        config, s = self.config, self.s
        from_rollout = s.rollout_weights(phase)
        with clock("stats"):
            s.check_rows(sequences)
            sequences = attach(sequences, config, s.engine, s.reference, s.make_batch, from_rollout)
        measures = due(config.metrics.measure_entropy_every, self.step)
        count = config.optim.updates_per_rollout
        updates = []
        for u, part in enumerate(experience.mini_batches(sequences, count)):
            with clock("train"):
                done = update(
                    s.engine,
                    experience.with_token_weights(part, config.loss),
                    s.make_batch,
                    micro_batch_size=config.optim.micro_batch_size,
                    params=s.loss_params,
                    weighting=s.weighting.kernel_weighting(phase) if from_rollout is None else None,
                    controller=s.weighting,
                    lr=learning_rate(self.step * count + u, config.steps * count, config.optim),
                    probe_tokens=config.metrics.measure_tokens if measures else None,
                    max_sampler_kl=config.sampler_kl_bound(u),
                )
            with clock("measure"):
                updates.append(done.measured(s.engine, s.make_batch))
        return updates

    def _observe(self, updates: list[Update]) -> None:
        """Feed the controllers with the global batch; a bad step teaches them nothing."""
        first = updates[0]
        if all(u.applied for u in updates) and first.sums.tokens:
            self.s.phase.update(max(0.0, first.sums.mean(first.sums.entropy)))
            self.s.weighting.update(first.branches)
        for u in updates:
            if not u.applied:
                self.s.say(f"step {self.step} skipped: {u.reason}")
