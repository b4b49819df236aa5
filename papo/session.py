"""What a run holds: model, engine, data, workers, controllers and writers, made from the config."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papo import checkpoint, collectives
from papo.batch import IDLE, MicroBatch, TrainingSequence, collate
from papo.cli import Progress
from papo.config import TrainConfig
from papo.data import ProblemSource
from papo.engine import Engine
from papo.errors import PapoError
from papo.evaluate import evaluate
from papo.experience import Collected
from papo.metrics import CompletionsWriter, MetricsWriter
from papo.models import eos_ids, load_causal_lm, load_tokenizer
from papo.objective import Policy, loss_of
from papo.phase import PhaseController
from papo.report import Report
from papo.reward import RewardPool, choose_verifier
from papo.rollout import HFSampler, SamplingParams
from papo.schedule import seed_of
from papo.telemetry import completion_rows
from papo.weighting import WeightController
from papo_kernels import PolicyLossParams, TokenStats


class Session:
    """The run's parts; leaving the context stops the reward workers and closes the writers."""

    def __init__(self, config: TrainConfig) -> None:
        config.check_world_size(collectives.world_size())
        self.config = config
        self.run_dir = Path(config.output_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self._resumed = checkpoint.resolve(config.resume, self.checkpoints)
        lead = collectives.rank() == 0
        self.progress = Progress(enabled=lead)
        with contextlib.ExitStack() as stack:
            verifier = choose_verifier(config.reward.verifier, config.data.source)
            self.rewards = stack.enter_context(RewardPool(config.reward, verifier))
            self.tokenizer = load_tokenizer(config.model)
            self.problems = ProblemSource(config.data, self.tokenizer, config.seed)
            self.engine, self.reference = self._engines()
            pad = self.tokenizer.pad_token_id
            eos = eos_ids(self.engine.policy.causal_lm, self.tokenizer)
            self.pad_id = eos[0] if pad is None else pad
            self.sampler = HFSampler(self.tokenizer, eos, self.pad_id)
            self.phase = PhaseController(config.phase)
            self.weighting = WeightController(config.weighting)
            self.loss_params = PolicyLossParams(
                config.loss.clip_low,
                config.loss.clip_high,
                config.loss.dual_clip,
                config.loss.kl_coef,
                config.loss.entropy_coef,
            )
            collectives.raise_together(self._prepare_run_dir() if lead else None)
            metrics = MetricsWriter(self.run_dir, config.metrics.tensorboard, lead)
            self.metrics = stack.enter_context(contextlib.closing(metrics))
            self.completions = CompletionsWriter(self.run_dir, lead and config.metrics.completions)
            self.results = Report(self.run_dir, enabled=lead)
            self._stack = stack.pop_all()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _prepare_run_dir(self) -> str | None:
        """A folder with the resolved config; what another run left there moves aside.

        Returns:
            What went wrong, if anything did.
        """
        try:
            if self._holds_another_run():
                numbers = itertools.count(1)
                aside = (self.run_dir.with_name(f"{self.run_dir.name}.{n}") for n in numbers)
                earlier = self.run_dir.rename(next(p for p in aside if not p.exists()))
                self.say(f"an earlier run's folder is now {earlier}")
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.config.dump_yaml(self.run_dir / "config.yaml")
        except OSError as error:
            return f"output_dir={self.config.output_dir!r}: {error.strerror}"
        return None

    def _holds_another_run(self) -> bool:
        """Whether the folder has results that this run does not go on from."""
        if self.config.resume == "auto":
            return False
        if self._resumed is not None and self._resumed.resolve().parent == (
            self.checkpoints.resolve()
        ):
            return False
        return any((self.run_dir / name).exists() for name in ("metrics.jsonl", "checkpoints"))

    def _engines(self) -> tuple[Engine, Engine | None]:
        config = self.config
        ds_config = config.deepspeed_dict(collectives.world_size())
        engine = Engine(self._policy(), ds_config, config.optim)
        reference = None
        if config.loss.kl_coef > 0:
            frozen = self._policy().requires_grad_(False)
            reference = Engine(frozen, ds_config, None)
        return engine, reference

    def _policy(self) -> Policy:
        config = self.config
        causal_lm = load_causal_lm(config.model)
        if config.model.activation_checkpointing:
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        chunk = config.loss.chunk_mib
        return Policy(
            causal_lm,
            temperature=config.rollout.temperature,
            backend=config.loss.backend,
            full_logits=config.loss.full_logits,
            chunk_bytes=None if chunk is None else chunk << 20,
        )

    def make_batch(self, sequences: Sequence[TrainingSequence]) -> MicroBatch:
        """A micro-batch of `sequences` on this rank's device."""
        batch = collate(
            sequences, pad_id=self.pad_id, max_row_tokens=self.config.optim.max_row_tokens
        )
        return batch.to(self.engine.device)

    def rollout_weights(self, phase: float) -> Any:
        """Polarity weights from the old policy (`weighting.source: rollout`), else None."""
        config = self.config.weighting
        if config.source != "rollout" or config.strength == 0.0:
            return None
        scale = self.weighting.scale(phase)

        def weights(stats: TokenStats, sequence: TrainingSequence) -> Tensor:
            # The old policy is the sampler's: its ratio is 1 and its polarity A c.
            h = self.weighting.shape_of(
                sequence.advantage * stats.unit_polarity, stats.unit_polarity
            )
            return (scale * (1.0 + config.strength * phase * h)).to(torch.float32)

        return weights

    def resume(self) -> tuple[int, int]:
        """Load the checkpoint that `resume` names, if any, and drop what was written after it.

        Returns:
            Step and data cursor to go on from; a collective.
        """
        step = cursor = 0
        if self._resumed is not None:
            self._create_optimizer_state()
            state = checkpoint.load(self._resumed, self.engine)
            step, cursor = state["step"], state["cursor"]
            self.phase.load_state_dict(state["phase"])
            self.weighting.load_state_dict(state["weighting"])
            self.results.evaluations = state["evaluations"]
            self.say(f"resumed from {self._resumed} after step {step}")
        if collectives.rank() == 0:
            checkpoint.discard_after(self.checkpoints, step)
        self.metrics.truncate_after(step)
        self.completions.truncate_after(step)
        return step, cursor

    def _create_optimizer_state(self) -> None:
        """One update of rate 0 that weighs nothing: then the moments exist, to be filled."""
        out = loss_of(self.engine, self.make_batch([IDLE]), PolicyLossParams(), None)
        self.engine.backward(out.loss, last=True)
        self.engine.step(0.0, blocked=False)

    def save(self, step: int, cursor: int) -> None:
        """Write the checkpoint of `step`; a collective."""
        # Randomness has no state: the seed and the step determine it.
        state = {
            "cursor": cursor,
            "phase": self.phase.state_dict(),
            "weighting": self.weighting.state_dict(),
            "evaluations": self.results.evaluations,
        }
        checkpoint.save(self.checkpoints, step, self.engine, state, self.config.checkpoint.keep)

    def export(self) -> None:
        """Write `final/`, an ordinary Hugging Face folder; a collective."""
        checkpoint.export(self.run_dir / "final", self.engine, self.tokenizer)

    def evaluate(self, label: str, step: int) -> None:
        """Measure, keep and show the held-out accuracy; a collective."""
        begin = time.perf_counter()
        options = self.config.evaluation
        held_out = self.problems.held_out()
        self.say(f"evaluating {label}: {len(held_out)} problems, {options.samples} samples each")
        params = SamplingParams.of(self.config.rollout, batch_size=options.batch_size)
        with self.engine.inference_model() as model:
            figures = evaluate(
                model,
                self.sampler,
                held_out,
                params,
                self.rewards.score,
                samples=options.samples,
                with_greedy=options.greedy,
                seed=seed_of(self.config.seed, "evaluation", collectives.rank()),
            )
        self.results.add(label, step, figures)
        shown = {f"eval/{k}": v for k, v in figures.items() if k != "problems"}
        self._write(lambda: self.metrics.write(step, shown))
        seconds = time.perf_counter() - begin
        self.say(f"held-out accuracy {label}: {figures['accuracy']:.3f} ({seconds:.0f} s)")

    def write(self, step: int, metrics: dict[str, float], collected: Collected) -> None:
        """Metrics, completions and progress of a finished step; a collective."""
        counts = collectives.gather_objects(len(collected.sampled))
        first = sum(counts[: collectives.rank()])
        rows = collectives.gather_lists(completion_rows(collected.sampled, first))
        self._write(lambda: self.completions.write(step, rows))
        self._write(lambda: self.metrics.write(step, metrics))
        self.progress.update(step, metrics)

    @staticmethod
    def _write(write: Callable[[], None]) -> None:
        """What writes on rank 0 alone; where that fails every rank fails. A collective."""
        failure = None
        try:
            write()
        except PapoError as error:
            failure = str(error)
        collectives.raise_together(failure)

    def say(self, text: str) -> None:
        """A line for the user, from rank 0."""
        self.progress.say(text)

    def report(self) -> None:
        """The closing table, summary.json and the plot."""
        self._write(lambda: self.results.finish(self.run_dir / "metrics.jsonl"))
