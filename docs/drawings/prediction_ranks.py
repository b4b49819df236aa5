"""Every predictor's rank correlation with its interval, from the validity study."""

from __future__ import annotations

from typing import Any

from experiments.validity.names import SCORES

from .plot import Panel
from .prediction_scatter import KINDS
from .svg import Canvas

WIDTH = 880
LEFT, TOP, PITCH, PLOT_WIDTH, GAP = 206, 84, 22, 126, 42
GOAL = 0.9
LABELS = {
    **SCORES,
    "own": "gradient of its own tokens",
    "own quarter": "of a quarter of them",
    "own prompt": "of those of one prompt",
    "another": "of one other batch",
    "others": "of eight other batches",
    "averaged": "averaged over steps",
}
BOLD = ("polarity", "averaged")
FIRST_OF_GROUP = {"polarity": "scores of tokens", "own": "first order in the weights"}


def draw(summary: dict[str, Any], source: str) -> str:
    """The chart as SVG; arguments as in `prediction_scatter.draw`."""
    groups = 28 * len(FIRST_OF_GROUP)
    height = TOP + PITCH * len(LABELS) + groups + 78
    canvas = Canvas(
        WIDTH,
        height,
        "Bar chart: rank correlation of every predictor with the measured change of entropy, for "
        "SGD and Adam on each task. Scores of tokens are below first order in the weights.",
    )
    canvas.text(18, 26, "Rank correlation with the measured change of entropy", size=15, bold=True)
    rows: dict[str, float] = {}
    y = TOP
    for name, label in LABELS.items():
        if name in FIRST_OF_GROUP:
            y += 22
            canvas.text(18, y, FIRST_OF_GROUP[name], color="muted", size=11.5)
            y += 6
        rows[name] = y
        canvas.text(LEFT - 8, y + 14, label, size=12, anchor="end", bold=name in BOLD)
        y += PITCH
    columns = [(task, kind) for task in summary["isolated"] for kind in KINDS]
    for i, (task, kind) in enumerate(columns):
        left = LEFT + (PLOT_WIDTH + GAP) * i
        found = summary["isolated"][task]["kinds"][kind]["predictors"]
        _column(canvas, left, y, rows, found)
        canvas.text(left, 54, task, size=12, color="muted")
        canvas.text(left, 71, KINDS[kind], bold=True)
    canvas.note(
        f"Lines: 95% of 10,000 bootstrap samples of the batches. Green: {GOAL}. {source}",
    )
    return canvas.svg()


def _column(
    canvas: Canvas, left: float, bottom: float, rows: dict[str, float], found: dict[str, Any]
) -> None:
    low = min(0.0, *(found[name]["interval"][0] for name in rows))
    panel = Panel(canvas, left, TOP, PLOT_WIDTH, bottom - TOP + 6, (max(low, -0.5), 1.0), (0, 1))
    zero = panel.at(0, 0)[0]
    for name, y in rows.items():
        estimate = found[name]
        ours = name in BOLD
        end = panel.at(estimate["value"], 0)[0]
        canvas.rect(min(zero, end), y + 3, abs(end - zero), PITCH - 7, "blue" if ours else "gray")
        ends = [panel.at(x, 0)[0] for x in estimate["interval"]]
        middle = y + 3 + (PITCH - 7) / 2
        canvas.path([(ends[0], middle), (ends[1], middle)], "ink", width=1.2)
        for x in ends:
            canvas.path([(x, middle - 3), (x, middle + 3)], "ink", width=1.2)
        value = f"{estimate['value']:.2f}".replace("-", "−")
        canvas.text(panel.at(1.0, 0)[0] + 6, y + 14, value, size=11, bold=ours)
    panel.line([(0, 0), (0, 1)], "muted", width=1)
    panel.line([(GOAL, 0), (GOAL, 1)], "green", width=1.2, dash="4 3")
    panel.x_ticks([0.0, 0.5, 1.0])
