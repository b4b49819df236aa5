"""What a run holds: model, engine, data, workers, controllers and writers, made from the config."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from papo.config import TrainConfig
from papo.data.problems import ProblemSource
from papo.data.prompts import opens_thinking
from papo.dist import collectives, folders
from papo.model import limits
from papo.model.load import eos_ids, load_model_config, load_tokenizer
from papo.policy.batch import Batcher
from papo.policy.objective import objective_of
from papo.policy.phase import PhaseController
from papo.policy.prediction import EntropyPrediction
from papo.policy.weighting import WeightController
from papo.record import run_folder
from papo.record.lock import FolderLock
from papo.record.progress import Progress
from papo.record.recorder import Recorder
from papo.reward.pool import RewardPool
from papo.rollout import HFSampler, SamplingParams
from papo.train import build, probe, references
from papo.train.entropy import EntropyGradient
from papo.train.evaluate import Evaluator, HeldOut
from papo.train.health import Health
from papo.train.resume import Origin
from papo.train.rows import RowCheck
from papo.train.state import RunState
from papo.train.stats import Passes
from papo.train.step import Updater

# torch compiles its CPU products for every shape that it meets and keeps the code: with rows of
# any width the main job grew by 24 MiB a step.
_CPU_WIDTHS = 32


class Session:
    """The run's parts; leaving the context stops the reward workers and closes the writers."""

    def __init__(self, config: TrainConfig) -> None:
        config.check_world_size(collectives.world_size())
        self.config = config
        self._checkpoints = Path(config.output_dir) / run_folder.CHECKPOINTS
        with ExitStack() as stack:
            self.progress = stack.enter_context(closing(Progress(enabled=collectives.rank() == 0)))
            self._open_folder(stack)
            self._open_problems(stack)
            self._build_policy()
            self._make_stages()
            self._open_recorder(stack)
            self._make_evaluation_and_state()
            self._stack = stack.pop_all()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _open_folder(self, stack: ExitStack) -> None:
        """The run's folder, for this run alone, and the checkpoint that it goes on from."""
        config, say = self.config, self.progress.say
        with collectives.failing_together():
            lock = FolderLock(Path(config.output_dir), enabled=collectives.rank() == 0)
            self._lock = stack.enter_context(closing(lock))
        if lock.warning:
            say(lock.warning)
        resumed = folders.resolve(config.resume, self._checkpoints)
        with collectives.failing_together():
            self.origin = Origin.of(resumed, config.resume_anyway, say)
            self.origin.check_config(config)
            run_folder.check(config, resumed)

    def _open_problems(self, stack: ExitStack) -> None:
        """Problems and reward workers: what can be refused before the model is loaded."""
        config = self.config
        with collectives.failing_together():
            build.check_backend(config.loss.backend)
            verifiers = config.reward.chosen(config.data.source)
            pool = RewardPool(config.reward, verifiers, config.data.answer_field)
            self.rewards = stack.enter_context(pool)
            self.tokenizer = load_tokenizer(config.model)
            self.problems = ProblemSource(config.data, self.tokenizer, config.seed)
            self._check_limits()
            prompt = self.problems.batch(0, 1)[0].prompt_ids
            self.rewards.thinks = opens_thinking(self.tokenizer, prompt)
        references.check(self.problems, self.rewards, config.reward.on_bad_reference, self.progress)
        self._fingerprints = {"problems": self.problems.fingerprint}
        with collectives.failing_together():
            self.origin.check_problems(self._fingerprints["problems"])

    def _build_policy(self) -> None:
        """The engines, the sampler, and the passes over sequences."""
        config, tokenizer = self.config, self.tokenizer
        policy, self._fingerprints["model"] = build.policy(config)
        with collectives.failing_together():
            self.origin.check_model(self._fingerprints["model"])
        self.engine, reference = build.engines(config, policy)
        eos = eos_ids(self.engine.policy.causal_lm, tokenizer)
        pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.sampler = HFSampler(tokenizer, eos, pad, config.rollout.skip_special_tokens)
        rows: Any = self.engine.policy.causal_lm.get_input_embeddings()
        limits.check_ids(max(self.problems.largest_id, pad, *eos), rows.num_embeddings)
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

    def _check_limits(self) -> None:
        """Refuse data and lengths that the model's tables have no room for, by its config alone."""
        problems, tokenizer = self.problems, self.tokenizer
        model = load_model_config(self.config.model)
        special = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        largest = max(problems.largest_id, *(i for i in special if i is not None))
        limits.check_ids(largest, limits.vocabulary_of(model))
        tokens = self.config.rollout.max_new_tokens
        warning = limits.check_lengths(model, problems.longest_prompt, tokens)
        if warning:
            self.progress.say(warning)

    def _make_stages(self) -> None:
        """The stages and controllers that keep something from step to step."""
        config = self.config
        self.phase = PhaseController(config.phase)
        self.weighting = WeightController(config.weighting)
        self.prediction = EntropyPrediction(config.optim, self.engine.trained_numel)
        share, decay = config.metrics.predict_share, config.metrics.predict_decay
        self.entropy_gradient = (
            EntropyGradient(self.engine, self.passes, share, decay) if share else None
        )
        objective = objective_of(config.loss)
        self.updater = Updater(self.engine, self.batcher, objective, self.weighting)
        noise, wanted = config.sampler_kl_noise, config.model.probe
        self.row_check = RowCheck(self.passes, noise, wanted, self.progress)

    def _open_recorder(self, stack: ExitStack) -> None:
        """The run's folder and the files in it."""
        recorder = Recorder(self.config, self.progress, self.origin.folder, self._lock)
        self.recorder = stack.enter_context(closing(recorder))

    def _make_evaluation_and_state(self) -> None:
        """What measures the policy between steps, and what its checkpoints hold."""
        config, options = self.config, self.config.evaluation
        evaluator = Evaluator(
            self.sampler,
            self.rewards,
            SamplingParams.of(config.rollout, batch_size=options.batch_size),
            samples=options.samples,
            with_greedy=options.greedy,
            success=config.reward.success,
            seed=config.seed,
        )
        self.held_out = HeldOut(evaluator, self.engine, self.problems, self.recorder)
        self.health = Health(config.health, self.engine, self._checkpoints, config.steps)
        self.state = RunState(
            config,
            self.origin,
            self.engine,
            self.batcher,
            self._fingerprints,
            {"phase": self.phase, "weighting": self.weighting, "prediction": self.prediction},
            self.health,
            self.recorder,
        )
