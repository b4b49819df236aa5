"""The README's chart: the CPU kernels beside torch.compile and TRL, from a result of bench_cpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from .bars import Bar, draw_axis, draw_bars
from .svg import Canvas

SHAPE = "[64,151936]"
DTYPES = ("float32", "bfloat16")
WIDTH, HEIGHT = 880, 372
PLOT = 212  # width of the longest bar
TOP, GROUP = 84, 104


class Panel(NamedTuple):
    """One half of the chart: a task, and each peer's case in the result."""

    left: float
    title: str
    note: str
    cases: dict[str, str]  # label: name in the JSON
    step: float  # between the axis's ticks, ms


PANELS = (
    Panel(
        18,
        "Log-prob and entropy",
        "papo: the entropy polarity as well",
        {"papo": "papo stats", "torch.compile": "compile fwd", "TRL": "trl fwd"},
        20,
    ),
    Panel(
        458,
        "Clipped loss with entropy bonus, and its gradient",
        "papo: in place of the logits; TRL: its statistics in an eager loss",
        {
            "papo": "papo loss+grad, entropy",
            "torch.compile": "compile fwd+bwd",
            "TRL": "trl fwd+bwd",
        },
        50,
    ),
)
COLORS = {"papo": "blue", "torch.compile": "gray", "TRL": "pale gray"}


def draw(path: Path) -> str:
    """The chart as SVG, from the JSON at `path`."""
    record = json.loads(path.read_text())
    times = {dtype: record["results"][f"{SHAPE} {dtype}"]["ms"] for dtype in DTYPES}
    canvas = Canvas(
        WIDTH,
        HEIGHT,
        "Bar chart: milliseconds that papo, torch.compile and TRL take for 64 rows of 151,936 "
        "logits on one CPU thread.",
    )
    canvas.text(
        18, 26, "Milliseconds for 64 × 151,936 logits on one CPU thread", size=15, bold=True
    )
    for panel in PANELS:
        _panel(canvas, panel, times)
    machine = record["environment"]
    canvas.text(
        18,
        HEIGHT - 30,
        f"{machine['cpu']} ({machine['isa']}), {machine['date'][:10]}: process CPU time, cold "
        f"cache, medians of {record['rounds']} interleaved rounds. "
        f"torch {machine['torch'].partition('+')[0]}, TRL {machine['trl']}.",
        color="muted",
        size=11.5,
    )
    canvas.text(
        18,
        HEIGHT - 13,
        "× is the time as a multiple of papo's. For bfloat16 logits TRL's results are bfloat16, "
        "papo's float32.",
        color="muted",
        size=11.5,
    )
    return canvas.svg()


def _panel(canvas: Canvas, panel: Panel, times: dict[str, dict[str, float]]) -> None:
    longest = max(times[dtype][case] for dtype in DTYPES for case in panel.cases.values())
    scale, left = PLOT / longest, panel.left + 92
    canvas.text(panel.left, 50, panel.title, bold=True)
    canvas.text(panel.left, 67, panel.note, color="muted", size=11.5)
    for i, dtype in enumerate(DTYPES):
        top = TOP + GROUP * i + 8
        canvas.text(left - 8, top + 12, dtype, color="muted", size=11.5, anchor="end")
        bars = [
            Bar(label, times[dtype][case], COLORS[label], label == "papo")
            for label, case in panel.cases.items()
        ]
        draw_bars(canvas, left, top + 20, scale, bars)
    draw_axis(canvas, left, TOP, TOP + GROUP * len(DTYPES), scale, longest, panel.step)
