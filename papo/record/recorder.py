"""All that a run leaves and shows: steps and evaluations in its files and on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from papo.dist import collectives
from papo.policy.advantage import ScoredGroup
from papo.record import run_folder
from papo.record.completions import CompletionsWriter, completion_rows
from papo.record.lock import FolderLock
from papo.record.metrics import MetricsWriter
from papo.record.progress import Progress
from papo.record.report import Report

if TYPE_CHECKING:
    from papo.config import TrainConfig


class Recorder:
    """Makes the run's folder ready and writes everything in it but checkpoints and models.

    Every method but `say` and `close` is a collective; rank 0 writes and shows.

    Args:
        progress: shows the lines.
        resumed: the checkpoint that the run goes on from, if any.
        lock: on the run's folder.

    Attributes:
        results: the evaluations so far.

    Raises:
        PapoError: the folder cannot be written to.
    """

    def __init__(
        self, config: TrainConfig, progress: Progress, resumed: Path | None, lock: FolderLock
    ) -> None:
        self._progress = progress
        self._success = config.reward.success
        self._explained = False
        folder, lead = Path(config.output_dir), collectives.rank() == 0
        with collectives.failing_together():
            if lead:
                earlier = run_folder.prepare(lock, config, resumed)
                if earlier is not None:
                    self.say(f"an earlier run's folder is now {earlier}")
            self._metrics = MetricsWriter(folder, config.metrics.tensorboard, lead)
            self._completions = CompletionsWriter(folder, lead and config.metrics.completions)
        self._metrics_path = folder / run_folder.METRICS_FILE
        self.results = Report(folder, enabled=lead)

    def truncate_after(self, step: int) -> None:
        """Drop what an earlier part of the run wrote after `step`."""
        with collectives.failing_together():
            self._metrics.truncate_after(step)
            self._completions.truncate_after(step)

    def step(self, step: int, metrics: dict[str, float], sampled: Sequence[ScoredGroup]) -> None:
        """Figures and completions of a finished step.

        Args:
            sampled: this rank's groups.
        """
        rows = completion_rows(sampled)
        with collectives.failing_together():
            self._completions.write(step, rows)
            self._metrics.write(step, metrics)
        self._progress.update(step, metrics)
        self._explain(metrics["reward/mean"], metrics["reward/accuracy"])

    def evaluation(
        self, label: str, step: int, figures: Mapping[str, float], seconds: float
    ) -> None:
        """Figures of an evaluation (`Evaluator.evaluate`), which took `seconds`."""
        self.results.add(label, step, figures)
        shown = {f"eval/{k}": v for k, v in figures.items() if k != "problems"}
        with collectives.failing_together():
            self._metrics.write(step, shown)
        masked = f", {figures['invalid']:.0f} masked" if figures["invalid"] else ""
        if "reward" not in figures:
            self.say(f"held-out accuracy {label}: none, no completion has a reward{masked}")
            return
        self.say(
            f"held-out accuracy {label}: {figures['accuracy']:.3f}, reward "
            f"{figures['reward']:.3f}{masked} ({seconds:.0f} s)"
        )
        self._explain(figures["reward"], figures["accuracy"])

    def _explain(self, reward: float, accuracy: float) -> None:
        """Say once why accuracies are 0 beside rewards that are not."""
        if reward > 0.0 and accuracy == 0.0 and not self._explained:
            self._explained = True
            self.say(
                f"the mean reward is {reward:.3f}, but no completion reached reward.success="
                f"{self._success:g}, from which it counts as right: accuracies are 0; "
                "lower it if your verifier gives less for a right answer"
            )

    def report(self) -> None:
        """The closing table, summary.json and the plot."""
        with collectives.failing_together():
            self.results.finish(self._metrics_path)

    def say(self, text: str) -> None:
        """A line for the user, from rank 0."""
        self._progress.say(text)

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self._completions.close()
