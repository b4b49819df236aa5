"""A panel with two axes, for points, bars and lines in their own units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .svg import Canvas, Point

Range = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """A part of a canvas and what its axes span.

    Attributes:
        left, top, width, height: of the area between the axes, in pixels.
        x, y: lowest and highest value.
    """

    canvas: Canvas
    left: float
    top: float
    width: float
    height: float
    x: Range
    y: Range

    def at(self, x: float, y: float) -> Point:
        """The pixel of a point, on the panel's edge where it lies outside."""
        across = (min(max(x, self.x[0]), self.x[1]) - self.x[0]) / (self.x[1] - self.x[0])
        up = (min(max(y, self.y[0]), self.y[1]) - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + self.width * across, self.top + self.height * (1 - up)

    def line(
        self, points: Sequence[Point], color: str, *, width: float = 1.5, dash: str | None = None
    ) -> None:
        """A line through points of the panel's units."""
        self.canvas.path([self.at(*point) for point in points], color, width=width, dash=dash)

    def dots(
        self, points: Sequence[Point], color: str, *, size: float = 5, opacity: float = 1
    ) -> None:
        """Dots at points of the panel's units."""
        self.canvas.dots([self.at(*p) for p in points], color, size=size, opacity=opacity)

    def whisker(self, x: float, ends: Range, color: str) -> None:
        """A vertical interval at x."""
        self.line([(x, ends[0]), (x, ends[1])], color, width=1.2)

    def x_ticks(self, values: Sequence[float], *, scale: float = 1, label: str = "") -> None:
        """Numbers below the panel, divided by `scale`, and a label under them."""
        bottom = self.top + self.height
        for value in values:
            x = self.at(value, self.y[0])[0]
            self.canvas.path([(x, bottom), (x, bottom + 4)], "muted", width=1)
            words = number(value / scale)
            self.canvas.text(x, bottom + 17, words, color="muted", size=11, anchor="middle")
        if label:
            middle = self.left + self.width / 2
            self.canvas.text(middle, bottom + 34, label, color="muted", size=11.5, anchor="middle")

    def y_ticks(self, values: Sequence[float], *, scale: float = 1) -> None:
        """Numbers left of the panel, divided by `scale`, with a rule at each."""
        for value in values:
            y = self.at(self.x[0], value)[1]
            color = "muted" if value == 0 else "rule"
            self.canvas.path([(self.left, y), (self.left + self.width, y)], color, width=1)
            words = number(value / scale)
            self.canvas.text(self.left - 7, y + 4, words, color="muted", size=11, anchor="end")


def ticks(span: Range, about: int = 5) -> list[float]:
    """Round numbers inside a range, about so many."""
    rough = (span[1] - span[0]) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(span[0] / step - 1e-9), math.floor(span[1] / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def span(values: Sequence[float], *, margin: float = 0.06, zero: bool = True) -> Range:
    """The range of values with a margin, and with 0 unless told otherwise."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = margin * (high - low) or 1.0
    return low - room, high + room


def thousands(span: Range) -> tuple[float, str]:
    """A power of 1000 that makes a range's numbers short, and how it is written before a unit."""
    largest = max(abs(span[0]), abs(span[1]))
    power = 3 * math.floor(math.log10(largest) / 3) if largest else 0
    return 10.0**power, f"10^{{{power}}} ".replace("-", "−") if power else ""


def number(value: float) -> str:
    """Without trailing zeros, and with a minus sign."""
    return f"{round(value, 9) + 0.0:g}".replace("-", "−")
