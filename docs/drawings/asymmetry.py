"""Means by a token's probability and the sign of its advantage, from the validity study."""

from __future__ import annotations

from typing import Any

from .plot import Panel, Range, span, thousands, ticks
from .svg import Canvas

WIDTH, HEIGHT = 880, 620
PLOT_WIDTH, PLOT_HEIGHT = 222, 172
LEFTS, TOPS = (54, 346, 632), (96, 366)
KINDS = {"sgd": "SGD", "adam": "Adam"}
QUANTITIES = {
    "own": "its own entropy",
    "true": "the batch's mean entropy",
}
SIGNS = {"positive": ("A > 0", "blue"), "negative": ("A < 0", "orange")}


def draw(summary: dict[str, Any], source: str, task: str = "chain_sum") -> str:
    """The chart of a task as SVG; other arguments as in `prediction_scatter.draw`."""
    found = summary["asymmetry"][task]
    canvas = Canvas(
        WIDTH,
        HEIGHT,
        "Bar charts over the probability of the sampled token, for positive and negative "
        "advantages: predicted polarity, the measured change of the token's own entropy, and the "
        "true effect of its update on the mean entropy of the batch.",
    )
    canvas.text(
        18, 26, "What a token's update does to entropy, by its probability", size=15, bold=True
    )
    for i, (label, color) in enumerate(SIGNS.values()):
        canvas.rect(640 + 90 * i, 15, 12, 12, color)
        canvas.text(658 + 90 * i, 26, label, size=12.5)
    middle = (TOPS[0] + TOPS[1]) / 2
    _panel(canvas, (LEFTS[0], middle), found, "predicted", ("predicted: A·c", ""))
    for row, (kind, label) in enumerate(KINDS.items()):
        for left, (name, title) in zip(LEFTS[1:], QUANTITIES.items(), strict=True):
            _panel(
                canvas, (left, TOPS[row]), found, f"{name} {kind}", (f"{label}: {title}", "nats")
            )
    tokens = sum(sum(found[sign]["tokens"]) for sign in SIGNS)
    canvas.note(
        f"Means over {tokens:,} tokens of {task}; lines: 95% of 1,000 bootstrap samples of the "
        f"batches. {source}",
    )
    return canvas.svg()


def _panel(
    canvas: Canvas,
    place: tuple[float, float],
    found: dict[str, Any],
    name: str,
    title: tuple[str, str],
) -> None:
    edges = found["edges"]
    bins = len(edges) - 1
    estimates = {sign: found[sign][name] for sign in SIGNS}
    ends = [x for side in estimates.values() for e in side if e for x in _ends(e)]
    y_span = span(ends)
    left, top = place
    panel = Panel(canvas, left, top, PLOT_WIDTH, PLOT_HEIGHT, (0, bins), y_span)
    scale, power = thousands(y_span)
    words, unit = title
    unit = f"{power}{unit}".strip()
    canvas.text(left, top - 26, words, bold=True)
    canvas.text(left, top - 10, f"mean, {unit}" if unit else "mean", color="muted", size=11.5)
    panel.y_ticks(ticks(y_span, 4), scale=scale)
    for sign, (_, color) in SIGNS.items():
        side = -0.36 if sign == "positive" else 0.02
        for i, estimate in enumerate(estimates[sign]):
            if estimate:
                _bar(panel, i + 0.5 + side, estimate, color)
    panel.line([(0, 0), (bins, 0)], "muted", width=1)
    bottom = top + PLOT_HEIGHT
    for i, edge in enumerate(edges):
        x = panel.at(i, 0)[0]
        canvas.path([(x, bottom), (x, bottom + 4)], "muted", width=1)
        canvas.text(x, bottom + 17, f"{edge:g}", color="muted", size=11, anchor="middle")
    middle = left + PLOT_WIDTH / 2
    words = "probability of the sampled token"
    canvas.text(middle, bottom + 34, words, color="muted", size=11.5, anchor="middle")


def _ends(estimate: dict[str, Any]) -> Range:
    low, high = estimate["interval"]
    return min(low, estimate["value"]), max(high, estimate["value"])


def _bar(panel: Panel, x: float, estimate: dict[str, Any], color: str) -> None:
    (left, top), (right, bottom) = (panel.at(x, 0), panel.at(x + 0.34, estimate["value"]))
    panel.canvas.rect(left, min(top, bottom), right - left, abs(bottom - top), color)
    panel.whisker(x + 0.17, _ends(estimate), "ink")
