"""The checkpoint that a run goes on from, and whether it is one of the same training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from papo.config import TrainConfig
from papo.config.resume import differences
from papo.dist.manifest import read_trainer
from papo.errors import PapoError, listed

_SHOWN = 5


@dataclass(frozen=True)
class Origin:
    """Where a run begins: at a checkpoint, or at the start.

    Each check raises PapoError where what is now is not what the checkpoint was made with; with
    `resume_anyway` it says so instead.

    Attributes:
        folder: the checkpoint, None at the start.
        saved: its trainer.json, empty at the start.
        anyway: the config's `resume_anyway`.
        say: shows a line.
    """

    folder: Path | None
    saved: Mapping[str, Any]
    anyway: bool
    say: Callable[[str], None]

    @classmethod
    def of(cls, folder: Path | None, anyway: bool, say: Callable[[str], None]) -> Origin:
        """Read what a checkpoint's folder says of itself."""
        return cls(folder, dict(read_trainer(folder)) if folder else {}, anyway, say)

    def check_config(self, config: TrainConfig) -> None:
        """The options that change what is trained."""
        if self.folder is not None:
            told = differences(self.saved.get("config", {}), config)
            if told:
                self._differ(f"options differ from those of {self.folder}: {listed(told, _SHOWN)}")

    def check_problems(self, fingerprint: str) -> None:
        """`ProblemSource.fingerprint`: the checkpoint's cursor counts in the problems' order."""
        if self.folder is not None and self.saved.get("problems") != fingerprint:
            self._differ(
                f"the training problems are not those of {self.folder} (rows, their order, the "
                "tokenizer, or what reward.on_bad_reference dropped)"
            )

    def check_model(self, fingerprint: str) -> None:
        """`papo.model.weights.fingerprint` of the model before training."""
        if self.folder is not None and self.saved.get("model") != fingerprint:
            self._differ(f"the weights at model.path are not those that {self.folder} began with")

    def _differ(self, what: str) -> None:
        if not self.anyway:
            raise PapoError(
                f"resume: {what}; change it back, begin a new run in another output_dir, or go on "
                "all the same with --resume-anyway"
            )
        self.say(f"--resume-anyway: {what}")
