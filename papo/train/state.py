"""What a run's checkpoint holds, saved, and loaded so that the run goes on exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from papo.data.problems import ProblemSource
from papo.dist import checkpoint, collectives
from papo.dist.engine import Engine
from papo.errors import PapoError
from papo.policy.batch import IDLE, Batcher
from papo.policy.passes import loss_of
from papo.record.recorder import Recorder
from papo_kernels import Objective


@dataclass(frozen=True)
class RunState:
    """Everything that a step depends on and earlier steps have changed.

    Randomness has no state: the seed and the step determine it.

    Attributes:
        folder: of the run's checkpoints.
        retention: which of them stay.
        weights: how they hold the weights, see `CheckpointConfig`.
        resumed: the checkpoint that the run goes on from, if any.
        parts: what changes beside the engine, by its name in a checkpoint.
        recorder: has the evaluations so far.
    """

    folder: Path
    retention: checkpoint.Retention
    weights: Literal["fp32", "bf16"]
    resumed: Path | None
    engine: Engine
    batcher: Batcher
    problems: ProblemSource
    parts: Mapping[str, checkpoint.Stateful]
    recorder: Recorder

    def save(self, step: int, cursor: int) -> None:
        """Write the checkpoint of `step`; a collective."""
        state = {
            "cursor": cursor,
            "problems": self.problems.fingerprint,
            **{name: part.state_dict() for name, part in self.parts.items()},
            "evaluations": self.recorder.results.evaluations,
        }
        checkpoint.save(self.folder, step, self.engine, state, self.retention, self.weights)

    def resume(self) -> tuple[int, int]:
        """Load the checkpoint to go on from, if any, and drop what was written after it; a
        collective.

        Returns:
            Step and data cursor to go on from.

        Raises:
            PapoError: the checkpoint is of another model or of other problems.
        """
        step = cursor = 0
        if self.resumed is not None:
            self._create_optimizer_state()
            state = checkpoint.load(self.resumed, self.engine)
            self._check_problems(state["problems"])
            step, cursor = state["step"], state["cursor"]
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.recorder.results.evaluations = state["evaluations"]
            self.recorder.say(f"resumed from {self.resumed} after step {step}")
        if collectives.rank() == 0:
            checkpoint.discard_after(self.folder, step)
        self.recorder.truncate_after(step)
        return step, cursor

    def _check_problems(self, trained_on: str) -> None:
        """Refuse other problems than the checkpoint's: its cursor counts in their order."""
        if trained_on != self.problems.fingerprint:
            raise PapoError(
                f"resume: the training problems are not those of {self.resumed} (rows, "
                "their order, or what reward.on_bad_reference dropped); expected the same data"
            )

    def _create_optimizer_state(self) -> None:
        """Make the optimizer's moments, to be filled, by an idle update at learning rate 0."""
        out = loss_of(self.engine, self.batcher.batch([IDLE]), Objective(), None)
        self.engine.backward(out.loss, last=True)
        self.engine.step(0.0, blocked=False)
