"""What a run holds: model, engine, data, workers, controllers and writers, made from the config."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papo.config import TrainConfig
from papo.data import references
from papo.data.problems import ProblemSource
from papo.dist import checkpoint, collectives
from papo.dist.engine import Engine, local_device
from papo.errors import PapoError
from papo.model import limits, probe
from papo.model.load import eos_ids, load_causal_lm, load_tokenizer, recompute_activations
from papo.policy.batch import IDLE, MicroBatch, TrainingSequence, collate, micro_batches
from papo.policy.objective import Policy, loss_of
from papo.policy.phase import PhaseController
from papo.policy.prediction import EntropyPrediction
from papo.policy.weighting import WeightController
from papo.record.metrics import CompletionsWriter, MetricsWriter
from papo.record.progress import Progress
from papo.record.report import Report
from papo.record.telemetry import completion_rows
from papo.reward.pool import RewardPool
from papo.reward.verifiers import choose_verifier
from papo.rollout import HFSampler, SamplingParams
from papo.train.evaluate import evaluate
from papo.train.experience import Collected
from papo.train.schedule import seed_of
from papo_kernels import PolicyLossParams, TokenStats
from papo_kernels.backends import choice as backends

# torch compiles its CPU products for every shape it meets and keeps the code: with rows of any
# width the main job grew by 24 MiB a step.
_CPU_WIDTHS = 32


class Session:
    """The run's parts; leaving the context stops the reward workers and closes the writers."""

    def __init__(self, config: TrainConfig) -> None:
        config.check_world_size(collectives.world_size())
        self.config = config
        self.run_dir = Path(config.output_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        lead = collectives.rank() == 0
        self.progress = Progress(enabled=lead)
        self._explained = False
        with contextlib.ExitStack() as stack:
            with collectives.failing_together():
                check_backend(config.loss.backend)
                self._resumed = checkpoint.resolve(config.resume, self.checkpoints)
                verifier = choose_verifier(config.reward.verifier, config.data.source)
                self.rewards = stack.enter_context(RewardPool(config.reward, verifier))
                self.tokenizer = load_tokenizer(config.model)
                self.problems = ProblemSource(config.data, self.tokenizer, config.seed)
                self.rewards.thinks = opens_thinking(
                    self.tokenizer, self.problems.batch(0, 1)[0].prompt_ids
                )
            references.check(self.problems, self.rewards, config.reward.on_bad_reference, self.say)
            self.engine, self.reference = self._engines()
            pad = self.tokenizer.pad_token_id
            eos = eos_ids(self.engine.policy.causal_lm, self.tokenizer)
            self.pad_id = eos[0] if pad is None else pad
            self.sampler = HFSampler(
                self.tokenizer, eos, self.pad_id, config.rollout.skip_special_tokens
            )
            self._check_limits(eos)
            self._row_tokens = config.optim.max_row_tokens
            self._rows_checked = not config.model.probe
            if config.model.probe:
                self._row_tokens = probe.check(
                    self.engine, self.sampler, self.tokenizer, self.pad_id, config, self.say
                )
            self.phase = PhaseController(config.phase)
            self.weighting = WeightController(config.weighting)
            self.prediction = EntropyPrediction(config.optim, self.engine.trained_numel)
            self.loss_params = PolicyLossParams(
                config.loss.clip_low,
                config.loss.clip_high,
                config.loss.dual_clip,
                config.loss.kl_coef,
                config.loss.entropy_coef,
            )
            with collectives.failing_together():
                if lead:
                    self._prepare_run_dir()
                metrics = MetricsWriter(self.run_dir, config.metrics.tensorboard, lead)
                self.metrics = stack.enter_context(contextlib.closing(metrics))
                wanted = lead and config.metrics.completions
                self.completions = CompletionsWriter(self.run_dir, wanted)
            self.results = Report(self.run_dir, enabled=lead)
            self._stack = stack.pop_all()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _prepare_run_dir(self) -> None:
        """A folder with the resolved config; what another run left there moves aside.

        Raises:
            PapoError: it cannot be made.
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
            raise PapoError(
                f"output_dir={self.config.output_dir!r}: {error.strerror}; "
                "free some space or choose another output_dir"
            ) from error

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
        with collectives.failing_together():
            causal_lm = load_causal_lm(config.model)
        if config.model.activation_checkpointing:
            recompute_activations(causal_lm, dropout=config.model.dropout)
        chunk = config.loss.chunk_mib
        return Policy(
            causal_lm,
            temperature=config.rollout.temperature,
            dropout=config.model.dropout,
            backend=config.loss.backend,
            full_logits=config.loss.full_logits,
            chunk_bytes=None if chunk is None else chunk << 20,
        )

    def _check_limits(self, eos: Sequence[int]) -> None:
        """Refuse data and lengths that the model's tables have no room for."""
        causal_lm, problems = self.engine.policy.causal_lm, self.problems
        rows = causal_lm.get_input_embeddings().num_embeddings
        limits.check_ids(max(problems.largest_id, self.pad_id, *eos), rows)
        tokens = self.config.rollout.max_new_tokens
        limits.check_lengths(causal_lm.config, problems.longest_prompt, tokens, self.say)

    def check_rows(self, sequences: Sequence[TrainingSequence]) -> None:
        """Give each completion its own row from now on, if sharing rows turns out to change the
        first ones that could; a collective."""
        if self._rows_checked or not self._row_tokens:
            return
        size = self.config.optim.micro_batch_size
        pieces = micro_batches(sequences, size, count=1)
        piece = max(pieces, key=lambda p: sum(len(s.response_ids) for s in p))
        shared = self.make_batch(piece)
        if collectives.all_max(float(shared.segment_ids is not None)) == 0.0:
            return
        apart = self.make_batch(piece, max_row_tokens=0)
        self._rows_checked = True
        fault = probe.rows_fault(self.engine, shared, apart, self.config.sampler_kl_noise)
        if fault:
            self._row_tokens = 0
            self.say(f"completions no longer share their prompt's row: {fault}")

    def make_batch(
        self, sequences: Sequence[TrainingSequence], max_row_tokens: int | None = None
    ) -> MicroBatch:
        """A micro-batch of `sequences` on this rank's device; `max_row_tokens` None is the run's
        own."""
        device = self.engine.device
        batch = collate(
            sequences,
            pad_id=self.pad_id,
            max_row_tokens=self._row_tokens if max_row_tokens is None else max_row_tokens,
            width_multiple=_CPU_WIDTHS if device.type == "cpu" else 1,
        )
        return batch.to(device)

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
            self._check_problems(state["problems"])
            step, cursor = state["step"], state["cursor"]
            self.phase.load_state_dict(state["phase"])
            self.weighting.load_state_dict(state["weighting"])
            self.prediction.load_state_dict(state["prediction"])
            self.results.evaluations = state["evaluations"]
            self.say(f"resumed from {self._resumed} after step {step}")
        if collectives.rank() == 0:
            checkpoint.discard_after(self.checkpoints, step)
        with collectives.failing_together():
            self.metrics.truncate_after(step)
            self.completions.truncate_after(step)
        return step, cursor

    def _check_problems(self, trained_on: str) -> None:
        """Refuse other problems than the checkpoint's: its cursor counts in their order."""
        if trained_on != self.problems.fingerprint:
            raise PapoError(
                f"resume: the training problems are not those of {self._resumed} (rows, their "
                "order, or what reward.on_bad_reference dropped); expected the same data"
            )

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
            "problems": self.problems.fingerprint,
            "phase": self.phase.state_dict(),
            "weighting": self.weighting.state_dict(),
            "prediction": self.prediction.state_dict(),
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
                success=self.config.reward.success,
                seed=seed_of(self.config.seed, "evaluation", collectives.rank()),
            )
        self.results.add(label, step, figures)
        shown = {f"eval/{k}": v for k, v in figures.items() if k != "problems"}
        with collectives.failing_together():
            self.metrics.write(step, shown)
        seconds = time.perf_counter() - begin
        masked = f", {figures['invalid']:.0f} masked" if figures["invalid"] else ""
        if "reward" not in figures:
            self.say(f"held-out accuracy {label}: none, no completion has a reward{masked}")
            return
        self.say(
            f"held-out accuracy {label}: {figures['accuracy']:.3f}, reward "
            f"{figures['reward']:.3f}{masked} ({seconds:.0f} s)"
        )
        self._explain(figures["reward"], figures["accuracy"])

    def write(self, step: int, metrics: dict[str, float], collected: Collected) -> None:
        """Metrics, completions and progress of a finished step; a collective."""
        counts = collectives.gather_objects(len(collected.sampled))
        first = sum(counts[: collectives.rank()])
        rows = collectives.gather_lists(completion_rows(collected.sampled, first))
        with collectives.failing_together():
            self.completions.write(step, rows)
            self.metrics.write(step, metrics)
        self.progress.update(step, metrics)
        self._explain(metrics["reward/mean"], metrics["reward/accuracy"])

    def _explain(self, reward: float, accuracy: float) -> None:
        """Say once why accuracies are 0 beside rewards that are not."""
        if reward > 0.0 and accuracy == 0.0 and not self._explained:
            self._explained = True
            self.say(
                f"the mean reward is {reward:.3f}, but no completion reached reward.success="
                f"{self.config.reward.success:g}, from which it counts as right: accuracies are 0; "
                "lower it if your verifier gives less for a right answer"
            )

    def say(self, text: str) -> None:
        """A line for the user, from rank 0."""
        self.progress.say(text)

    def report(self) -> None:
        """The closing table, summary.json and the plot."""
        with collectives.failing_together():
            self.results.finish(self.run_dir / "metrics.jsonl")


def opens_thinking(tokenizer: Any, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt ends with `<think>`, as some chat templates make it."""
    return bool(tokenizer.decode(prompt_ids[-8:]).rstrip().endswith("<think>"))


def check_backend(name: str | None) -> None:
    """Refuse a kernel backend that cannot serve this rank's device, before anything is loaded.

    Raises:
        PapoError: it, or the one that PAPO_BACKEND names, cannot.
    """
    try:
        backends.module(backends.choose(name, local_device(), torch.float32))
    except (ValueError, RuntimeError, ImportError) as error:
        option = "" if name is None else f"loss.backend={name!r}: "
        raise PapoError(f"{option}{error}; without it the fastest one that can is taken") from error
