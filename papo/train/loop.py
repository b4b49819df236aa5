"""The stages in order: problems, rollout, reward, advantage, batch, stats, phase, loss, step."""

from __future__ import annotations

from pathlib import Path

import torch

from papo.config import TrainConfig
from papo.dist import checkpoint, collectives, group, termination
from papo.policy.batch import TrainingSequence
from papo.policy.update import Update
from papo.record.telemetry import StageClock, memory_metrics, rollout_metrics, update_metrics
from papo.train import experience
from papo.train.entropy import EntropyMeasurement
from papo.train.rounds import SamplingRounds
from papo.train.schedule import due, learning_rate, seed_of
from papo.train.session import Session
from papo.train.stats import attach


def run(config: TrainConfig) -> int:
    """Train as `config` says; 0 at the end, also after a signal (with a checkpoint).

    Raises:
        PapoError: what a user can mend, on every rank.
    """
    with group.joined(), Session(config) as session:
        return Loop(config, session).run()


class Loop:
    """A run's position (step and data cursor) and its stages in order."""

    def __init__(self, config: TrainConfig, session: Session) -> None:
        self.config = config
        self.s = session
        self.step = 0
        self.cursor = 0

    def run(self) -> int:
        """Resume, train, evaluate, report."""
        config, s = self.config, self.s
        self.step, self.cursor = s.state.resume()
        if self.step == 0 and config.evaluation.before:
            s.held_out.evaluate("before", self.step)
        s.progress.start(config.steps, self.step)
        termination.PROCESS.steps_begin()
        stops = self._stops()
        while not stops and self.step < config.steps:
            self._train_step()
            if due(config.evaluation.every, self.step) and self.step < config.steps:
                s.held_out.evaluate(f"step {self.step}", self.step)
            stops = self._stops()
            if stops or due(config.checkpoint.every, self.step) or self.step == config.steps:
                s.state.save(self.step, self.cursor)
        termination.PROCESS.steps_end(stopped=bool(stops))
        s.progress.close()
        if stops:
            s.recorder.say(
                f"stopped after step {self.step}: {stops}; go on from there with --resume auto"
            )
            return 0
        checkpoint.export(Path(config.output_dir) / "final", s.engine, s.tokenizer)
        if config.evaluation.after:
            s.held_out.evaluate("after", self.step)
        s.recorder.report()
        return 0

    def _stops(self) -> str:
        """Why a rank has to stop early, empty if none has to; a collective."""
        return max(collectives.gather_objects(termination.PROCESS.reason))

    def _train_step(self) -> None:
        config, s, clock = self.config, self.s, StageClock()
        with clock.entering("gather", s.engine.inference_model()) as model:
            rounds = SamplingRounds(
                config, s.problems, s.sampler, s.rewards, model, clock, self.step, self.cursor
            )
            collected = experience.collect(
                rounds, config.rollout.prompts_per_step, config.dynamic_sampling
            )
        self.cursor = rounds.cursor
        phase, sampled = s.phase.phase, collected.sampled
        sequences = experience.to_sequences(collected.groups)
        with clock("stats"):
            s.row_check.check(sequences)
            gradient = self._take_entropy_gradient(sequences)
        updates = self._updates(sequences, phase, clock)
        self.step += 1
        metrics = {
            **gradient,
            **rollout_metrics(sampled, collected.rounds, config.reward.success),
            **update_metrics(updates),
            **s.weighting.metrics(phase),
            "phase/phi": phase,
            "optim/lr": updates[-1].lr,
        }
        fault = s.health.fault(updates, sampled, metrics)
        if not fault:
            self._observe(updates)
        metrics |= {**s.prediction.observe(updates), **s.phase.metrics()}
        metrics |= {**memory_metrics(), **clock.metrics(sampled)}
        s.recorder.step(self.step, metrics, sampled)
        s.health.stop(self.step, fault)

    def _take_entropy_gradient(self, sequences: list[TrainingSequence]) -> dict[str, float]:
        """What the step's prediction is made with, where it is due; its norm."""
        gradient, every = self.s.entropy_gradient, self.config.metrics.predict_every
        if gradient is None or (self.s.engine.has_average and not due(every, self.step)):
            return {}
        return {"entropy/gradient_norm": gradient.take(sequences)}

    def _updates(
        self, sequences: list[TrainingSequence], phase: float, clock: StageClock
    ) -> list[Update]:
        config, s, count = self.config, self.s, self.config.optim.updates_per_rollout
        # For the model's dropout, where it is kept.
        torch.manual_seed(seed_of(config.seed, "dropout", self.step, collectives.rank()))
        measures = due(config.metrics.measure_entropy_every, self.step)
        with clock("stats"):
            sequences = attach(sequences, s.passes, s.reference, s.weighting, phase, count)
        updates = []
        for u, part in enumerate(experience.mini_batches(sequences, count)):
            with clock("train"):
                pieces = s.passes.pieces(experience.with_token_weights(part, config.loss))
                tokens = config.metrics.measure_tokens
                entropy = EntropyMeasurement.of(s.passes, pieces, tokens) if measures else None
                done = s.updater.update(
                    pieces,
                    s.weighting.kernel_weighting(phase),
                    learning_rate(self.step * count + u, config.steps * count, config.optim),
                    config.sampler_kl_bound(u),
                )
            with clock("measure"):
                updates.append(done if entropy is None else entropy.measure(done))
        return updates

    def _observe(self, updates: list[Update]) -> None:
        """Feed the controllers with the global batch; a bad step teaches them nothing."""
        first = updates[0]
        if all(u.applied for u in updates) and first.sums.tokens:
            self.s.phase.update(max(0.0, first.sums.mean(first.sums.entropy)))
            self.s.weighting.update(first.branches)
        for u in updates:
            if not u.applied:
                self.s.recorder.say(f"step {self.step} skipped: {u.reason}")
