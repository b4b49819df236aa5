"""What a finished run leaves: the table of held-out accuracy, summary.json and a plot."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from papo.errors import PapoError
from papo.outputs import replace_file
from papo.policy.prediction import PREDICTIONS, correlation_of, rank_correlation
from papo.record.jsonl import read_rows
from papo.record.screen import showing

_COLUMNS = {
    "accuracy": "accuracy",
    "pass_at_k": "pass@k",
    "greedy": "greedy",
    "reward": "reward",
    "reward_greedy": "greedy reward",
    "truncated": "truncated",
}


class Report:
    """Collects the evaluations of a run and closes it.

    Args:
        run_dir: folder of the run.
        enabled: False on every rank but 0: evaluations are kept, nothing is written.

    Attributes:
        evaluations: `{"label", "step", **figures}` each, in order; JSON-able, part of the
            checkpoint.
    """

    def __init__(self, run_dir: Path, enabled: bool) -> None:
        self._run_dir = run_dir
        self._enabled = enabled
        self.evaluations: list[dict[str, Any]] = []

    def add(self, label: str, step: int, figures: Mapping[str, float]) -> None:
        """Keep an evaluation; one of the same label is replaced."""
        self.evaluations = [e for e in self.evaluations if e["label"] != label]
        self.evaluations.append({"label": label, "step": step, **figures})

    def finish(self, metrics_path: Path) -> None:
        """Print the table and write summary.json and curves.png.

        Args:
            metrics_path: the run's metrics.jsonl.

        Raises:
            PapoError: the files cannot be written.
        """
        if not self._enabled:
            return
        steps = [row for row in read_rows(metrics_path) if "reward/mean" in row]
        try:
            text = json.dumps(summary(self.evaluations, steps), indent=1) + "\n"
            replace_file(self._run_dir / "summary.json", text.encode())
            if steps:
                plot(steps, self._run_dir / "curves.png")
        except OSError as error:
            raise PapoError(
                f"cannot write the report in {self._run_dir}: {error.strerror}; free some space or "
                "choose another output_dir"
            ) from error
        if self.evaluations:
            print_table(self.evaluations)
        with showing():
            print(f"run: {self._run_dir}   model: {self._run_dir / 'final'}", flush=True)


def summary(
    evaluations: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What summary.json holds.

    The evaluations and the change from `before` to `after`; the last step's figures and the median
    seconds of a step; how well entropy changes were predicted over all steps, None where it cannot
    be told.
    """
    by_label = {e["label"]: e for e in evaluations}
    seconds = sorted(s["time/step"] for s in steps if s.get("time/step") is not None)
    result: dict[str, Any] = {"evaluations": list(evaluations), "steps": len(steps)}
    if "before" in by_label and "after" in by_label:
        result["change"] = _change(by_label["before"], by_label["after"])
    if seconds:
        result["step_seconds_median"] = seconds[len(seconds) // 2]
        result["last_step"] = dict(steps[-1])
    if steps:
        result["prediction_correlation"] = {
            name.removeprefix("entropy/"): None if math.isnan(r) else r
            for name in PREDICTIONS
            for r in [_correlation(steps, name)]
        }
    return result


def _correlation(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    """Spearman's, of a prediction and the measured entropy change."""
    return rank_correlation(_series(steps, name), _series(steps, "entropy/measured_delta"))


def _change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {
        name: after[name] - before[name] for name in _COLUMNS if name in before and name in after
    }


def print_table(evaluations: Sequence[Mapping[str, Any]]) -> None:
    """The evaluations as a table, with the change from `before` to `after` as its last row."""
    from rich.console import Console
    from rich.table import Table

    names = [name for name in _COLUMNS if any(name in e for e in evaluations)]
    problems = max(e.get("problems", 0.0) for e in evaluations)
    table = Table(title=f"Held-out accuracy ({problems:.0f} problems, never trained on)")
    table.add_column("")
    table.add_column("step", justify="right")
    for name in names:
        table.add_column(_COLUMNS[name], justify="right")
    for e in evaluations:
        table.add_row(e["label"], str(e["step"]), *(f"{e[n]:.3f}" if n in e else "" for n in names))
    by_label = {e["label"]: e for e in evaluations}
    if "before" in by_label and "after" in by_label:
        change = _change(by_label["before"], by_label["after"])
        table.add_section()
        table.add_row("change", "", *(f"{change[n]:+.3f}" if n in change else "" for n in names))
    with showing():
        Console(soft_wrap=True).print(table)


def plot(steps: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Reward, entropy, phase, the running correlations of the predicted entropy changes, and each
    prediction against what was measured, as a PNG.

    Args:
        steps: rows of metrics.jsonl; a figure that is missing or null leaves a gap.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7), layout="constrained")
    FigureCanvasAgg(figure)
    # Four above, one for each prediction below.
    places = figure.subplot_mosaic("aaabbbcccddd\neeeeffffgggg")
    reward, entropy, phase, running, *deltas = places.values()
    x = [row["step"] for row in steps]
    reward.plot(x, _series(steps, "reward/mean"))
    reward.set(title="reward", xlabel="step", ylabel="mean reward")
    entropy.plot(x, _series(steps, "entropy/mean"), label="mean")
    entropy.plot(x, _series(steps, "phase/reference"), "--", color="gray", label="reference")
    entropy.set(title="entropy", xlabel="step", ylabel="nats")
    entropy.legend()
    phase.plot(x, _series(steps, "phase/phi"))
    phase.axhline(0.0, color="gray", linewidth=0.8)
    phase.set(title="phase", xlabel="step", ylabel="φ", ylim=(-1.05, 1.05))
    for axes, (name, label) in zip(deltas, PREDICTIONS.items(), strict=True):
        points = _scatter_delta(axes, steps, name, label)
    figure.colorbar(points, ax=deltas[-1], label="step")
    for name, label in PREDICTIONS.items():
        running.plot(x, _series(steps, correlation_of(name)), label=label)
    running.axhline(0.0, color="gray", linewidth=0.8)
    running.set(title="running correlation", xlabel="step", ylabel="Spearman", ylim=(-1.05, 1.05))
    running.legend(loc="lower right")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    replace_file(path, image.getvalue())


def _scatter_delta(axes: Any, steps: Sequence[Mapping[str, Any]], name: str, label: str) -> Any:
    """A prediction against the measured entropy change, colored by step."""
    points = axes.scatter(
        _series(steps, name),
        _series(steps, "entropy/measured_delta"),
        c=[row["step"] for row in steps],
        cmap="viridis",
    )
    axes.axhline(0.0, color="gray", linewidth=0.8)
    axes.axvline(0.0, color="gray", linewidth=0.8)
    axes.locator_params(axis="x", nbins=5)
    r = _correlation(steps, name)
    told = "" if math.isnan(r) else f" (Spearman {r:.2f})"
    axes.set(
        title=f"entropy change of a step{told}",
        xlabel=f"predicted, {label}",
        ylabel="measured (nats)",
    )
    return points


def _series(steps: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    values = (row.get(name) for row in steps)
    return [math.nan if value is None else float(value) for value in values]
