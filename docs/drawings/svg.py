"""A small SVG canvas whose colors follow the reader's light or dark mode.

Coordinates and sizes are in pixels, y points down. A color is a name of `COLORS`. Every image has
its own background, so it reads well also where a page and the system disagree about the mode.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from xml.sax.saxutils import escape

# name: (light, dark)
COLORS = {
    "paper": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9198a1"),
    "rule": ("#d1d9e0", "#3d444d"),
    "panel": ("#f6f8fa", "#151b23"),
    "gray": ("#818b98", "#7d8590"),
    "pale gray": ("#b8c0c9", "#525b66"),
    "blue": ("#0969da", "#4493f8"),
    "pale blue": ("#ddf0ff", "#13294a"),
    "orange": ("#bc4c00", "#f0883e"),
    "pale orange": ("#fff1e5", "#3a2110"),
    "green": ("#1a7f37", "#3fb950"),
    "pale green": ("#dafbe1", "#12301c"),
}
FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
ARROW = 7.0  # length of an arrow's head

Point = tuple[float, float]


class Canvas:
    """An image under construction; `svg` gives its text.

    Args:
        width, height: of the image.
        title: a sentence that says what the image shows, for readers who do not see it.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self._size = (width, height)
        self._title = title
        self._used: set[tuple[str, str]] = set()
        self._parts: list[str] = []
        self.rect(0, 0, width, height, "paper", radius=6)

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        edge: str | None = None,
        radius: float = 0,
    ) -> None:
        """A box with its top left corner at (x, y)."""
        classes = self._classes(fill=fill, stroke=edge)
        rounded = f' rx="{_number(radius)}"' if radius else ""
        place = _attributes(x=x, y=y, width=width, height=height)
        self._parts.append(f"<rect {place}{rounded} {classes}/>")

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        color: str = "ink",
        size: float = 13,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """A line of text with its baseline at y; `^{...}` raises and `_{...}` lowers a part."""
        more = f' text-anchor="{anchor}"' if anchor != "start" else ""
        more += ' font-weight="600"' if bold else ""
        more += f' font-size="{_number(size)}"' if size != 13 else ""
        classes = self._classes(fill=color)
        self._parts.append(f"<text {_attributes(x=x, y=y)}{more} {classes}>{_spans(words)}</text>")

    def note(self, words: str) -> None:
        """A line at the foot of the picture."""
        self.text(18, self._size[1] - 12, words, color="muted", size=11.5)

    def path(
        self,
        points: Sequence[Point],
        color: str,
        *,
        width: float = 1.5,
        dash: str | None = None,
        arrow: bool = False,
    ) -> None:
        """A line through `points`, with a head at its end where `arrow`."""
        points = list(points)
        if arrow:
            tip, shaft = _head(points[-2], points[-1])
            self._parts.append(f'<polygon points="{_pairs(tip)}" {self._classes(fill=color)}/>')
            points[-1] = shaft
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        classes = self._classes(stroke=color)
        self._parts.append(
            f'<polyline points="{_pairs(points)}" fill="none" '
            f'stroke-width="{_number(width)}"{dashed} {classes}/>'
        )

    def dots(
        self, points: Sequence[Point], color: str, *, size: float = 5, opacity: float = 1
    ) -> None:
        """A round dot at each of `points`; `size` is its diameter."""
        dots = "".join(f"M{_number(x)},{_number(y)}h0" for x, y in points)
        faint = f' stroke-opacity="{_number(opacity)}"' if opacity < 1 else ""
        classes = self._classes(stroke=color)
        self._parts.append(
            f'<path d="{dots}" stroke-width="{_number(size)}" stroke-linecap="round"{faint} '
            f"{classes}/>"
        )

    def svg(self) -> str:
        """The image as text."""
        width, height = map(_number, self._size)
        rules = [_rules(self._used, mode) for mode in (0, 1)]
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" font-family="{FONT}" font-size="13">'
        )
        style = f"<style>{rules[0]}\n@media (prefers-color-scheme: dark){{{rules[1]}}}</style>"
        title = f"<title>{escape(self._title)}</title>"
        return "\n".join([head, title, style, *self._parts, "</svg>", ""])

    def _classes(self, fill: str | None = None, stroke: str | None = None) -> str:
        named = [(kind, color) for kind, color in (("fill", fill), ("stroke", stroke)) if color]
        self._used.update((kind, color) for kind, color in named)
        return f'class="{" ".join(_class(*pair) for pair in named)}"'


def _class(kind: str, color: str) -> str:
    return f"{kind[0]}-{color.replace(' ', '-')}"


def _rules(used: set[tuple[str, str]], mode: int) -> str:
    return "".join(
        f".{_class(kind, color)}{{{kind}:{COLORS[color][mode]}}}" for kind, color in sorted(used)
    )


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _attributes(**values: float) -> str:
    return " ".join(f'{name}="{_number(value)}"' for name, value in values.items())


def _pairs(points: Sequence[Point]) -> str:
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in points)


def _head(before: Point, tip: Point) -> tuple[list[Point], Point]:
    """The triangle of an arrow's head, and where its shaft ends."""
    angle = math.atan2(tip[1] - before[1], tip[0] - before[0])
    back = (tip[0] - ARROW * math.cos(angle), tip[1] - ARROW * math.sin(angle))
    side = (0.45 * ARROW * math.sin(angle), -0.45 * ARROW * math.cos(angle))
    corners = [(back[0] + sign * side[0], back[1] + sign * side[1]) for sign in (1, -1)]
    return [tip, *corners], back


def _spans(words: str) -> str:
    """`words` with its raised and lowered parts as smaller spans."""
    out, shift = [], 0
    for part in re.split(r"([\^_]\{[^}]*\})", words):
        if not part:
            continue
        at = {"^": -5, "_": 3}[part[0]] if part[1:2] == "{" else 0
        plain = escape(part[2:-1] if at else part)
        size = ' font-size="9.5"' if at else ""
        move = f' dy="{at - shift}"' if at != shift else ""
        out.append(f"<tspan{move}{size}>{plain}</tspan>" if move or size else plain)
        shift = at
    return "".join(out)
