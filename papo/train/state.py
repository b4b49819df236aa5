"""What a run's checkpoint holds, saved, and loaded so that the run goes on exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from papo.config import TrainConfig
from papo.dist import checkpoint, collectives
from papo.dist.engine import Engine
from papo.dist.folders import Retention, discard_after
from papo.policy.batch import IDLE, Batcher
from papo.policy.passes import evaluating, loss_of, stats_of
from papo.record.recorder import Recorder
from papo.record.run_folder import CHECKPOINTS
from papo.train.health import Health
from papo.train.resume import Origin
from papo_kernels import Objective


@dataclass(frozen=True)
class RunState:
    """Everything that a step depends on and earlier steps have changed.

    Randomness has no state: the seed and the step determine it.

    Attributes:
        origin: the checkpoint that the run goes on from, if any.
        fingerprints: of the training problems and of the model, `problems` and `model`.
        parts: what else changes beside the engine, by its name in a checkpoint.
        recorder: has the evaluations so far.
    """

    config: TrainConfig
    origin: Origin
    engine: Engine
    batcher: Batcher
    fingerprints: Mapping[str, str]
    parts: Mapping[str, checkpoint.Stateful]
    health: Health
    recorder: Recorder

    @property
    def folder(self) -> Path:
        """Of the run's checkpoints."""
        return Path(self.config.output_dir) / CHECKPOINTS

    def save(self, step: int, cursor: int) -> None:
        """Write the checkpoint of `step`; a collective.

        Raises:
            PapoError: it cannot be written, or the policy is no longer one to go on from.
        """
        self._check_policy(step)
        evaluations, options = self.recorder.results.evaluations, self.config.checkpoint
        state = {
            "cursor": cursor,
            "score": next((e.get("accuracy") for e in evaluations if e["step"] == step), None),
            "bad_steps": self.health.bad_steps,
            "config": self.config.model_dump(mode="json"),
            **self.fingerprints,
            **{name: part.state_dict() for name, part in self.parts.items()},
            "evaluations": evaluations,
        }
        retention = Retention(options.keep, options.keep_best)
        checkpoint.save(self.folder, step, self.engine, state, retention, options.weights)

    def resume(self) -> tuple[int, int]:
        """Load the checkpoint to go on from, if any, and drop what was written after it; a
        collective.

        Returns:
            Step and data cursor to go on from.

        Raises:
            PapoError: the checkpoint is of another model.
        """
        step = cursor = 0
        resumed, asked = self.origin.folder, self.config.resume
        if resumed is not None:
            self._create_optimizer_state()
            predicts = self.config.metrics.predict_share > 0
            state = checkpoint.load(resumed, self.engine, average=predicts)
            step, cursor = state["step"], state["cursor"]
            self.health.bad_steps = state["bad_steps"]
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.recorder.results.evaluations = state["evaluations"]
            self.recorder.say(f"--resume {asked}: going on from {resumed} after step {step}")
        elif asked == "auto":
            self.recorder.say(f"--resume auto: no checkpoint in {self.folder}, so from the start")
        if collectives.rank() == 0:
            discard_after(self.folder, step)
        self.recorder.truncate_after(step)
        return step, cursor

    def _check_policy(self, step: int) -> None:
        """Stop where weights are finite, but too large to compute with: a good checkpoint would
        make room for this one."""
        with evaluating(self.engine):
            entropy = stats_of(self.engine, self.batcher.batch([IDLE])).entropy
        broken = collectives.all_max(float(not entropy.isfinite().all()))
        self.health.stop(step, "the policy gives no token a probability" if broken else "")

    def _create_optimizer_state(self) -> None:
        """Make the optimizer's moments, to be filled, by an idle update at learning rate 0."""
        out = loss_of(self.engine, self.batcher.batch([IDLE]), Objective(), None)
        self.engine.backward(out.loss, last=True)
        self.engine.step(0.0, blocked=False)
