"""Predicted and measured changes over the steps of whole runs, from the validity study."""

from __future__ import annotations

import itertools
import math
from typing import Any

from .plot import Panel, number, span, thousands, ticks
from .svg import Canvas

WIDTH, HEIGHT = 880, 590
PLOT_WIDTH, PLOT_HEIGHT = 236, 174
LEFTS, TOPS = (54, 340, 626), (92, 336)
# Label, color and width of each line; polarity's unit is not nats, and is scaled to the measured's.
LINES = {
    "measured": ("measured", "ink", 1.6),
    "first order": ("first order", "blue", 1.6),
    "polarity through AdamW": ("polarity, scaled", "orange", 1.1),
}
SERIES = {"levels": "change of a step", "differences": "less the step before"}


def draw(summary: dict[str, Any], source: str) -> str:
    """The chart as SVG, of each method's first seed; arguments as in `prediction_scatter.draw`."""
    canvas = Canvas(
        WIDTH,
        HEIGHT,
        "Line charts over the steps of a run of each method: measured change of entropy, the "
        "change that first order predicted, and polarity's; above as they are, below as "
        "differences from step to step.",
    )
    canvas.text(18, 26, "Change of mean entropy by each step of a run", size=15, bold=True)
    x = 520.0
    for label, color, width in LINES.values():
        canvas.path([(x, 22), (x + 22, 22)], color, width=width)
        canvas.text(x + 28, 26, label, size=12)
        x += 46 + 6.6 * len(label)
    for left, (method, found) in zip(LEFTS, summary["runs"].items(), strict=False):
        series = next(iter(found["series"].values()))
        for top, name in zip(TOPS, SERIES, strict=True):
            title = f"{method}: {SERIES[name]}"
            value = found["predictions"]["first order"][name]["value"]
            _panel(canvas, (left, top), _lines(series, name), title, value)
    canvas.note(
        "Lines: first seed, polarity through AdamW. ρ: first order's rank correlation, mean of the "
        f"seeds. {source}",
    )
    return canvas.svg()


def _lines(series: dict[str, list[float]], name: str) -> dict[str, list[tuple[float, float]]]:
    """The points of each line."""
    steps = series["step"]
    lines = {}
    for label in LINES:
        values = series[label]
        if label.startswith("polarity"):
            factor = _norm(series["measured"]) / (_norm(values) or 1.0)
            values = [factor * value for value in values]
        if name == "differences":
            values = [b - a for a, b in itertools.pairwise(values)]
        lines[label] = list(zip(steps[-len(values) :], values, strict=True))
    return lines


def _norm(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def _panel(
    canvas: Canvas,
    place: tuple[float, float],
    lines: dict[str, list[tuple[float, float]]],
    title: str,
    correlation: float | None,
) -> None:
    points = [point for line in lines.values() for point in line]
    y_span = span([y for _, y in points])
    x_span = (min(x for x, _ in points), max(x for x, _ in points))
    left, top = place
    panel = Panel(canvas, left, top, PLOT_WIDTH, PLOT_HEIGHT, x_span, y_span)
    scale, power = thousands(y_span)
    canvas.text(left, top - 24, title, size=12.5, bold=True)
    canvas.text(left, top - 8, f"{power}nats", color="muted", size=11.5)
    if correlation is not None:
        words = f"ρ = {number(round(correlation, 2))}"
        canvas.text(left + PLOT_WIDTH, top - 8, words, color="blue", anchor="end", bold=True)
    panel.y_ticks(ticks(y_span, 4), scale=scale)
    for label, line in reversed(lines.items()):
        _, color, width = LINES[label]
        panel.line(line, color, width=width)
    panel.x_ticks(ticks(x_span), label="step" if top == TOPS[-1] else "")
