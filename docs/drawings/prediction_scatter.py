"""Predicted against measured change of entropy, a point a batch, from the validity study."""

from __future__ import annotations

from typing import Any

from .plot import Panel, span, thousands, ticks
from .svg import Canvas

WIDTH, HEIGHT = 880, 686
PLOT_WIDTH, PLOT_HEIGHT = 352, 214
LEFTS, TOPS = (64, 502), (78, 386)
COLORS = {"chain_sum": "blue", "mawps": "orange"}
KINDS = {"sgd": "SGD", "adam": "Adam, β_{1} = 0"}
PREDICTORS = {"polarity": "polarity", "averaged": "first order, averaged gradient"}


def draw(summary: dict[str, Any], source: str) -> str:
    """The chart as SVG.

    Args:
        summary: of experiments/results/validity-*.json.
        source: its path, for the reader.
    """
    canvas = Canvas(
        WIDTH,
        HEIGHT,
        "Scatter charts of the predicted and the measured change of mean entropy, a point a batch: "
        "polarity beside first order with an averaged gradient, for steps of SGD and of Adam.",
    )
    canvas.text(18, 26, "Change of a batch's mean entropy, nats", size=15, bold=True)
    for i, (task, found) in enumerate(summary["isolated"].items()):
        x = LEFTS[1] + 4 + 180 * i
        canvas.dots([(x, 22)], COLORS[task], size=8)
        canvas.text(x + 10, 26, f"{task}, {found['batches']} batches", size=12.5)
    for row, kind in enumerate(KINDS):
        for column, predictor in enumerate(PREDICTORS):
            _panel(canvas, summary["isolated"], (row, column), kind, predictor)
    canvas.note(
        f"ρ: Spearman's rank correlation over batches. Dashes: predicted = measured. {source}",
    )
    return canvas.svg()


def _panel(
    canvas: Canvas, isolated: dict[str, Any], place: tuple[int, int], kind: str, predictor: str
) -> None:
    found = {task: figures["kinds"][kind] for task, figures in isolated.items()}
    points = {task: f["points"] for task, f in found.items()}
    xs = [x for p in points.values() for x in p[predictor]]
    ys = [y for p in points.values() for y in p["measured"]]
    x_span, y_span = span(xs), span(ys)
    left, top = LEFTS[place[1]], TOPS[place[0]]
    panel = Panel(canvas, left, top, PLOT_WIDTH, PLOT_HEIGHT, x_span, y_span)
    canvas.text(left, top - 12, f"{KINDS[kind]}: {PREDICTORS[predictor]}", bold=True)
    (x_scale, x_power), (y_scale, y_power) = thousands(x_span), thousands(y_span)
    panel.y_ticks(ticks(y_span, 4), scale=y_scale)
    in_nats = predictor != "polarity"
    unit = f"{x_power}nats" if in_nats else x_power
    panel.x_ticks(ticks(x_span), scale=x_scale, label=f"predicted, {unit}" if unit else "predicted")
    canvas.text(left + 6, top + 14, f"measured, {y_power}nats", color="muted", size=11.5)
    panel.line([(0, y_span[0]), (0, y_span[1])], "muted", width=1)
    if in_nats:
        low, high = max(x_span[0], y_span[0]), min(x_span[1], y_span[1])
        panel.line([(low, low), (high, high)], "muted", width=1, dash="5 4")
    for task, p in points.items():
        panel.dots(list(zip(p[predictor], p["measured"], strict=True)), COLORS[task], opacity=0.6)
    for i, (task, figures) in enumerate(found.items()):
        value = f"ρ = {figures['predictors'][predictor]['value']:.2f}".replace("-", "−")
        at = top + PLOT_HEIGHT - 10 - 17 * (len(found) - 1 - i)
        canvas.text(left + PLOT_WIDTH - 8, at, value, color=COLORS[task], anchor="end", bold=True)
