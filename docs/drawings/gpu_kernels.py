"""The README's chart: the GPU kernels beside their peers, from two records of gpu-check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from .bars import PITCH, Bar, draw_axis, draw_bars
from .svg import Canvas

SHAPE = "[8192,151936] bfloat16"
WIDTH, HEIGHT = 880, 340
PLOT, LABELS = 190, 142  # width of the longest bar, and of the labels before it
TOP = 84


class Panel(NamedTuple):
    """One half of the chart: a task, and each case in the record, by its label."""

    left: float
    title: str
    note: str
    cases: dict[str, str]
    step: float  # between the axis's ticks, ms


STATISTICS = Panel(
    18,
    "Log-prob and entropy",
    "papo: the entropy polarity as well",
    {
        "papo, CUDA": "papo cuda stats fwd",
        "papo, Triton": "papo triton stats fwd",
        "TRL": "TRL logp+entropy fwd",
        "torch.compile": "torch.compile logp+entropy fwd",
    },
    0.5,
)
LOSS = Panel(
    440,
    "Loss with its gradient",
    "papo, Liger: clipped policy loss; QuACK, torch: cross-entropy",
    {
        "papo, CUDA": "papo cuda loss+dlogits",
        "QuACK": "QuACK cross_entropy with dx (loss only)",
        "papo, Triton": "papo triton loss+dlogits",
        "Liger GRPO": "Liger triton_grpo_loss fwd+bwd, in place (loss only)",
        "TRL statistics": "TRL logp+entropy fwd+bwd",
        "torch cross_entropy": "torch F.cross_entropy fwd+bwd (loss only)",
        "compiled statistics": "torch.compile logp+entropy fwd+bwd",
    },
    2,
)


def draw(statistics: Path, loss: Path) -> str:
    """The chart as SVG; each half is of one run, in the JSON at its path."""
    records = [json.loads(path.read_text()) for path in (statistics, loss)]
    canvas = Canvas(
        WIDTH,
        HEIGHT,
        "Bar chart: milliseconds that papo, TRL, Liger, QuACK and torch take for 8,192 rows of "
        "151,936 logits on an H200.",
    )
    title = "Milliseconds for 8,192 × 151,936 bfloat16 logits on an H200"
    canvas.text(18, 26, title, size=15, bold=True)
    for panel, record in zip((STATISTICS, LOSS), records, strict=True):
        _panel(canvas, panel, record["stages"]["peers"]["result"]["results"][SHAPE]["figures"])
    machine = records[1]["environment"]
    canvas.text(
        18,
        HEIGHT - 14,
        f"{machine['gpu']}, {machine['date'][:10]}: CUDA events, cold cache, medians of 10 "
        f"interleaved rounds. torch {machine['torch'].partition('+')[0]}, Triton "
        f"{machine['triton']}. × is a multiple of the first bar.",
        color="muted",
        size=11.5,
    )
    return canvas.svg()


def _panel(canvas: Canvas, panel: Panel, figures: dict[str, Any]) -> None:
    bars = [
        Bar(label, figures[case]["ms"], _color(label), label.startswith("papo"))
        for label, case in panel.cases.items()
    ]
    longest = max(bar.ms for bar in bars)
    scale, left = PLOT / longest, panel.left + LABELS
    canvas.text(panel.left, 50, panel.title, bold=True)
    canvas.text(panel.left, 67, panel.note, color="muted", size=11.5)
    draw_bars(canvas, left, TOP + 8, scale, bars)
    bottom = TOP + 16 + PITCH * len(bars)
    draw_axis(canvas, left, TOP, bottom, scale, longest, panel.step)


def _color(label: str) -> str:
    if label.startswith("papo"):
        return "blue"
    return "gray" if label.startswith(("torch", "compiled")) else "pale gray"
