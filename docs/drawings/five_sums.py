"""What one pass over a row keeps, and how polarity comes out of it."""

from __future__ import annotations

from typing import NamedTuple

from .svg import Canvas, Point

WIDTH, HEIGHT = 960, 424
LOGITS = (30, 52, 18, 74, 44, 96, 26, 60, 12, 38, 20, 48)  # heights of the sketched row
SAMPLED = 3


class Box(NamedTuple):
    """A quantity: its name and formula, its corner and size, its colors."""

    name: str
    formula: str
    x: float
    y: float
    width: float
    height: float
    fill: str = "panel"
    edge: str = "rule"

    @property
    def left(self) -> Point:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + self.height / 2


def _sum(row: int, name: str, formula: str) -> Box:
    return Box(name, formula, 214, 74 + 46 * row, 158, 34, "pale blue", "blue")


SUMS = {
    "target": _sum(0, "u_{a}", "sampled logit"),
    "max": _sum(1, "m", "max u"),
    "Z": _sum(2, "Z", "Σ e^{d}"),
    "T": _sum(3, "T", "Σ e^{d} d"),
    "Z2": _sum(4, "Z2", "Σ e^{2d}"),
    "T2": _sum(5, "T2", "Σ e^{2d} d"),
}
LOGP = Box("log-prob ℓ_{a}", "u_{a} − m − log Z", 436, 86, 196, 48)
ENTROPY = Box("entropy H", "log Z − T/Z", 436, 174, 196, 48)
STATE = Box("state term", "T2/Z² − (T/Z)(Z2/Z²)", 436, 282, 196, 48)
SAMPLED_TERM = Box("sampled term", "−p_{a} (ℓ_{a} + H),  p_{a} = e^{ℓa}", 692, 118, 250, 48)
UNIT = Box("unit polarity c", "state term + sampled term", 692, 214, 250, 48, "panel", "ink")
POLARITY = Box(
    "polarity", "r · A · c,  and ΔH ≈ η · polarity", 692, 306, 250, 48, "pale orange", "orange"
)
EDGES = (
    ("target", LOGP),
    ("max", LOGP),
    ("Z", LOGP),
    ("Z", ENTROPY),
    ("T", ENTROPY),
    ("Z", STATE),
    ("T", STATE),
    ("Z2", STATE),
    ("T2", STATE),
)


def draw() -> str:
    """The drawing as SVG."""
    canvas = Canvas(
        WIDTH,
        HEIGHT,
        "Diagram: one pass over a row of logits keeps its maximum, the sampled logit and four "
        "sums; log-prob, entropy and the state term follow from them, and from those the polarity.",
    )
    headers = ("one row of logits", "one pass keeps", "statistics", "polarity")
    for x, words in zip((18, 214, 436, 692), headers, strict=True):
        canvas.text(x, 36, words, size=15, bold=True)
    _row(canvas)
    for name, box in EDGES:
        start, end = SUMS[name].right, box.left
        canvas.path([start, (end[0] - 2, end[1])], "gray", width=1.2, arrow=True)
    for box in (LOGP, ENTROPY):
        canvas.path([box.right, SAMPLED_TERM.left], "gray", width=1.2, arrow=True)
    canvas.path([STATE.right, UNIT.left], "gray", width=1.2, arrow=True)
    middle = UNIT.x + UNIT.width / 2
    for above, below in ((SAMPLED_TERM, UNIT), (UNIT, POLARITY)):
        points = [(middle, above.y + above.height), (middle, below.y)]
        canvas.path(points, "gray", width=1.2, arrow=True)
    for box in SUMS.values():
        _flat(canvas, box)
    for box in (LOGP, ENTROPY, STATE, SAMPLED_TERM, UNIT, POLARITY):
        _tall(canvas, box)
    canvas.text(POLARITY.x, 378, "> 0: the step expands entropy", color="muted", size=12.5)
    canvas.text(POLARITY.x, 396, "< 0: it contracts it", color="muted", size=12.5)
    note = (
        "Parts of a row (lanes, warps, blocks, chunks, ranks)",
        "merge by moving to one maximum.",
    )
    for i, words in enumerate(note):
        canvas.text(214, 378 + 18 * i, words, color="muted", size=12.5)
    return canvas.svg()


def _row(canvas: Canvas) -> None:
    """The logits as bars, the sampled one in orange."""
    base = 232
    for i, height in enumerate(LOGITS):
        color = "orange" if i == SAMPLED else "pale gray"
        canvas.rect(18 + 13 * i, base - height, 9, height, color)
    canvas.path([(16, base), (176, base)], "muted", width=1)
    canvas.text(18 + 13 * SAMPLED + 4.5, base + 17, "a", color="orange", anchor="middle", bold=True)
    canvas.path([(182, 190), (208, 190)], "gray", arrow=True)
    lines = ("a is the sampled token", "u = softcap(z) / τ", "d = u − m")
    for i, words in enumerate(lines):
        canvas.text(18, base + 46 + 20 * i, words, color="muted", size=12.5)


def _flat(canvas: Canvas, box: Box) -> None:
    """Name and formula on one line."""
    canvas.rect(box.x, box.y, box.width, box.height, box.fill, edge=box.edge, radius=5)
    canvas.text(box.x + 12, box.y + 22, box.name, bold=True)
    canvas.text(box.x + 48, box.y + 22, box.formula)


def _tall(canvas: Canvas, box: Box) -> None:
    """The name above the formula."""
    canvas.rect(box.x, box.y, box.width, box.height, box.fill, edge=box.edge, radius=5)
    canvas.text(box.x + 12, box.y + 20, box.name, bold=True)
    canvas.text(box.x + 12, box.y + 38, box.formula)
