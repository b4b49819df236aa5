"""Horizontal bars of milliseconds, for the charts of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .svg import Canvas

BAR, PITCH = 17, 24


class Bar(NamedTuple):
    """A bar's label, its length in milliseconds, and its color; `ours` is set in bold."""

    label: str
    ms: float
    color: str
    ours: bool


def draw_bars(canvas: Canvas, left: float, top: float, scale: float, bars: Sequence[Bar]) -> None:
    """Bars from `left`, `scale` pixels a millisecond, and beside each of the others' how many times
    the first one's it is."""
    for i, bar in enumerate(bars):
        y = top + PITCH * i
        canvas.text(left - 8, y + 13, bar.label, size=12.5, anchor="end", bold=bar.ours)
        canvas.rect(left, y, scale * bar.ms, BAR, bar.color)
        value = f"{_digits(bar.ms)} ms"
        if not bar.ours:
            value += f", {bar.ms / bars[0].ms:.1f}×"
        canvas.text(left + scale * bar.ms + 6, y + 13, value, size=12.5, bold=bar.ours)


def draw_axis(
    canvas: Canvas,
    left: float,
    top: float,
    bottom: float,
    scale: float,
    longest: float,
    step: float,
) -> None:
    """The two axes, and a tick every `step` milliseconds up to `longest`."""
    tick = 0.0
    while tick <= longest:
        x = left + scale * tick
        canvas.path([(x, bottom), (x, bottom + 4)], "muted", width=1)
        unit = " ms" if tick == 0 else ""
        canvas.text(x, bottom + 18, f"{tick:g}{unit}", color="muted", size=11, anchor="middle")
        tick += step
    canvas.path([(left, top), (left, bottom), (left + scale * longest, bottom)], "muted", width=1)


def _digits(ms: float) -> str:
    """Three digits."""
    return f"{ms:.{2 if ms < 10 else 1 if ms < 100 else 0}f}"
