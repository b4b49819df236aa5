"""What a run holds: model, engine, data, workers, controllers and writers, made from the config."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from papo.config import TrainConfig
from papo.data.problems import ProblemSource
from papo.dist import checkpoint, collectives
from papo.errors import PapoError
from papo.model import limits
from papo.model.load import eos_ids, load_tokenizer
from papo.policy.batch import IDLE, Batcher, TrainingSequence
from papo.policy.passes import loss_of
from papo.policy.phase import PhaseController
from papo.policy.prediction import EntropyPrediction
from papo.policy.weighting import WeightController
from papo.record import run_folder
from papo.record.completions import CompletionsWriter, completion_rows
from papo.record.metrics import MetricsWriter
from papo.record.progress import Progress
from papo.record.report import Report
from papo.reward.pool import RewardPool
from papo.reward.verifiers import choose_verifier
from papo.rollout import HFSampler, SamplingParams
from papo.train import build, probe, references
from papo.train.evaluate import Evaluator
from papo.train.experience import Collected
from papo.train.rows import RowCheck
from papo.train.schedule import seed_of
from papo.train.stats import Passes
from papo.train.step import Updater
from papo_kernels import Objective

# torch compiles its CPU products for every shape that it meets and keeps the code: with rows of
# any width the main job grew by 24 MiB a step.
_CPU_WIDTHS = 32


class Session:
    """The run's parts; leaving the context stops the reward workers and closes the writers."""

    def __init__(self, config: TrainConfig) -> None:
        config.check_world_size(collectives.world_size())
        self.config = config
        self.run_dir = Path(config.output_dir)
        self.checkpoints = self.run_dir / run_folder.CHECKPOINTS
        self._lead = collectives.rank() == 0
        self._explained = False
        with ExitStack() as stack:
            self.progress = stack.enter_context(closing(Progress(enabled=self._lead)))
            self._open_problems(stack)
            self._build_policy()
            self._make_stages()
            self._open_writers(stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _open_problems(self, stack: ExitStack) -> None:
        """Problems and reward workers: what can be refused before the model is loaded."""
        config = self.config
        with collectives.failing_together():
            build.check_backend(config.loss.backend)
            self._resumed = checkpoint.resolve(config.resume, self.checkpoints)
            verifier = choose_verifier(config.reward.verifier, config.data.source)
            self.rewards = stack.enter_context(RewardPool(config.reward, verifier))
            self.tokenizer = load_tokenizer(config.model)
            self.problems = ProblemSource(config.data, self.tokenizer, config.seed)
            prompt = self.problems.batch(0, 1)[0].prompt_ids
            self.rewards.thinks = build.opens_thinking(self.tokenizer, prompt)
        references.check(self.problems, self.rewards, config.reward.on_bad_reference, self.progress)

    def _build_policy(self) -> None:
        """The engines, the sampler, and the passes over sequences."""
        config, tokenizer = self.config, self.tokenizer
        self.engine, reference = build.engines(config)
        eos = eos_ids(self.engine.policy.causal_lm, tokenizer)
        pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.sampler = HFSampler(tokenizer, eos, pad, config.rollout.skip_special_tokens)
        self._check_limits((pad, *eos))
        row_tokens = config.optim.max_row_tokens
        if config.model.probe:
            row_tokens = probe.check(
                self.engine, self.sampler, tokenizer, pad, config, self.progress
            )
        device = self.engine.device
        self.batcher = Batcher(pad, row_tokens, device, _CPU_WIDTHS if device.type == "cpu" else 1)
        size = config.optim.micro_batch_size
        self.passes = Passes(self.engine, self.batcher, size)
        self.reference = None if reference is None else Passes(reference, self.batcher, size)

    def _check_limits(self, special_ids: Sequence[int]) -> None:
        """Refuse data and lengths that the model's tables have no room for."""
        causal_lm, problems = self.engine.policy.causal_lm, self.problems
        rows = causal_lm.get_input_embeddings().num_embeddings
        limits.check_ids(max(problems.largest_id, *special_ids), rows)
        tokens = self.config.rollout.max_new_tokens
        warning = limits.check_lengths(causal_lm.config, problems.longest_prompt, tokens)
        if warning:
            self.say(warning)

    def _make_stages(self) -> None:
        """The stages and controllers that keep something from step to step."""
        config, loss = self.config, self.config.loss
        self.phase = PhaseController(config.phase)
        self.weighting = WeightController(config.weighting)
        self.prediction = EntropyPrediction(config.optim, self.engine.trained_numel)
        self._stateful: dict[str, checkpoint.Stateful] = {
            "phase": self.phase,
            "weighting": self.weighting,
            "prediction": self.prediction,
        }
        objective = Objective(
            loss.clip_low, loss.clip_high, loss.dual_clip, loss.kl_coef, loss.entropy_coef
        )
        self.updater = Updater(self.engine, self.batcher, objective, self.weighting)
        self._row_check = RowCheck(self.passes, config.sampler_kl_noise, config.model.probe)
        options = config.evaluation
        self.evaluator = Evaluator(
            self.sampler,
            self.rewards,
            SamplingParams.of(config.rollout, batch_size=options.batch_size),
            samples=options.samples,
            with_greedy=options.greedy,
            success=config.reward.success,
            seed=seed_of(config.seed, "evaluation", collectives.rank()),
        )

    def _open_writers(self, stack: ExitStack) -> None:
        """The run's folder and the files in it."""
        config, lead = self.config, self._lead
        with collectives.failing_together():
            if lead:
                earlier = run_folder.prepare(config, self._resumed)
                if earlier is not None:
                    self.say(f"an earlier run's folder is now {earlier}")
            metrics = MetricsWriter(self.run_dir, config.metrics.tensorboard, lead)
            self.metrics = stack.enter_context(closing(metrics))
            completions = CompletionsWriter(self.run_dir, lead and config.metrics.completions)
            self.completions = stack.enter_context(closing(completions))
        self.results = Report(self.run_dir, enabled=lead)

    def check_rows(self, sequences: Sequence[TrainingSequence]) -> None:
        """Check the first rows that completions could share. Where sharing changes their log-probs,
        each completion has its own row from now on. A collective."""
        fault = self._row_check.check(sequences)
        if fault:
            self.say(f"completions no longer share their prompt's row: {fault}")

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
            for name, part in self._stateful.items():
                part.load_state_dict(state[name])
            self.results.evaluations = state["evaluations"]
            self.say(f"resumed from {self._resumed} after step {step}")
        if self._lead:
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
        """Make the optimizer's moments, to be filled, by an idle update at learning rate 0."""
        out = loss_of(self.engine, self.batcher.batch([IDLE]), Objective(), None)
        self.engine.backward(out.loss, last=True)
        self.engine.step(0.0, blocked=False)

    def save(self, step: int, cursor: int) -> None:
        """Write the checkpoint of `step`; a collective."""
        # Randomness has no state: the seed and the step determine it.
        state = {
            "cursor": cursor,
            "problems": self.problems.fingerprint,
            **{name: part.state_dict() for name, part in self._stateful.items()},
            "evaluations": self.results.evaluations,
        }
        checkpoint.save(self.checkpoints, step, self.engine, state, self.config.checkpoint.keep)

    def export(self) -> None:
        """Write `final/`, an ordinary Hugging Face folder; a collective."""
        checkpoint.export(self.run_dir / "final", self.engine, self.tokenizer)

    def evaluate(self, label: str, step: int) -> None:
        """Measure, keep and show the held-out accuracy; a collective."""
        begin = time.perf_counter()
        held_out, samples = self.problems.held_out(), self.evaluator.samples
        self.say(f"evaluating {label}: {len(held_out)} problems, {samples} samples each")
        with self.engine.inference_model() as model:
            figures = self.evaluator.evaluate(model, held_out)
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
            self.results.finish(self.run_dir / run_folder.METRICS_FILE)
