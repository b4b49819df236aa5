"""Entropy over the demo's steps, PAPO and GRPO, from the recorded runs of the main job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .svg import Canvas, Point

WIDTH, HEIGHT = 880, 392
LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 52, 52, 590, 262
STEPS, NATS = 40, 2.6  # what the axes span
TARGET, WARMUP = 1.2, 5  # phase.target and phase.warmup_steps of configs/smollm2-arithmetic.yaml
LABEL_PITCH = 17.0
DASHES = (None, "7 3", "2 3", "9 3 2 3")


def draw(paths: Sequence[Path]) -> str:
    """The chart as SVG, from the JSON files at `paths`."""
    runs = [
        (f"{run['name']}{_machine(record)}", [step["entropy/mean"] for step in run["steps"]])
        for record in (json.loads(path.read_text()) for path in paths)
        for run in record["runs"]
    ]
    canvas = Canvas(
        WIDTH,
        HEIGHT,
        "Line chart: mean entropy of the sampled tokens over 40 steps. Four runs of papo end "
        "between 0.5 and 1.2 nats; the run of grpo ends at 0.1.",
    )
    canvas.text(18, 26, "Mean entropy of a step's tokens, nats", size=15, bold=True)
    _axes(canvas)
    styles = iter(DASHES)
    ends = []
    for name, values in runs:
        ours = name.startswith("papo")
        color, dash = ("blue", next(styles)) if ours else ("orange", None)
        canvas.path([_place(i + 1, v) for i, v in enumerate(values)], color, width=1.8, dash=dash)
        ends.append((_place(STEPS, values[-1])[1], name, color, dash))
    _labels(canvas, ends)
    canvas.note(
        "SmolLM2-135M-Instruct on sums of two one-digit numbers; one seed a line. "
        "benchmarks/results/main-job-*.json",
    )
    return canvas.svg()


def _machine(record: dict) -> str:
    """The second machine's name; the first is where most runs were made."""
    return " (Xeon)" if "Xeon" in record["machine"] else ""


def _place(step: float, nats: float) -> Point:
    x = LEFT + PLOT_WIDTH * (step - 1) / (STEPS - 1)
    return x, TOP + PLOT_HEIGHT * (1 - nats / NATS)


def _axes(canvas: Canvas) -> None:
    bottom = TOP + PLOT_HEIGHT
    canvas.rect(LEFT, TOP, _place(WARMUP, 0)[0] - LEFT, PLOT_HEIGHT, "panel")
    for half in range(6):
        y = _place(1, half / 2)[1]
        canvas.path([(LEFT, y), (LEFT + PLOT_WIDTH, y)], "rule", width=1)
        canvas.text(LEFT - 8, y + 4, f"{half / 2:.1f}", color="muted", size=11.5, anchor="end")
    for step in (1, 10, 20, 30, 40):
        x = _place(step, 0)[0]
        canvas.text(x, bottom + 18, str(step), color="muted", size=11.5, anchor="middle")
    middle = LEFT + PLOT_WIDTH / 2
    canvas.text(middle, bottom + 38, "step", color="muted", size=11.5, anchor="middle")
    canvas.text(LEFT + 4, bottom - 8, "warm-up", color="muted", size=11.5)
    y = _place(1, TARGET)[1]
    canvas.path([(LEFT, y), (LEFT + PLOT_WIDTH, y)], "green", dash="4 4")
    canvas.text(LEFT + 4, y - 6, "papo's reference", color="green", size=11.5)


def _labels(canvas: Canvas, ends: list[tuple[float, str, str, str | None]]) -> None:
    """Each line's name beside its end, moved apart where ends are close."""
    lowest = float("-inf")
    for y, name, color, dash in sorted(ends, key=lambda end: end[0]):
        at = max(y, lowest + LABEL_PITCH)
        x = LEFT + PLOT_WIDTH
        canvas.path([(x + 4, y), (x + 14, at)], "rule", width=1)
        canvas.path([(x + 16, at), (x + 44, at)], color, width=1.8, dash=dash)
        canvas.text(x + 50, at + 4, name, color=color, size=12)
        lowest = at
