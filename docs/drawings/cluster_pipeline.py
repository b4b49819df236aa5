"""How a cluster of blocks keeps a row on chip: slices, buffers, roles, and their order in time."""

from __future__ import annotations

from .svg import Canvas

WIDTH, HEIGHT = 960, 650
BLOCKS = 8
LEFT, SLICE = 148, 98  # the row's left edge; a slice's width
LANES = {"copy": 508, "compute": 548, "finish": 588}  # tops of the lanes of time
SLOT = 128  # width of a piece of work in time


def draw() -> str:
    """The drawing as SVG."""
    canvas = Canvas(
        WIDTH,
        HEIGHT,
        "Diagram: a row of 151,936 bfloat16 logits is cut into eight slices, one for each block of "
        "a cluster. In a block a copy warp, compute warps and a finish warp work on three rows.",
    )
    _cluster(canvas)
    _block(canvas)
    _time(canvas)
    return canvas.svg()


def _cluster(canvas: Canvas) -> None:
    """The row in slices, the blocks they go to, the exchange between the blocks."""
    canvas.text(18, 30, "A cluster of 8 blocks holds a row", size=15, bold=True)
    canvas.text(18, 79, "global memory", color="muted", size=12.5)
    words = "one row: 151,936 bfloat16 logits, 304 KB, in slices of 38 KB"
    canvas.text(LEFT, 55, words, color="muted", size=12.5)
    canvas.text(18, 105, "bulk copies", color="muted", size=12.5)
    canvas.text(18, 143, "blocks", color="muted", size=12.5)
    for i in range(BLOCKS):
        x = LEFT + SLICE * i
        middle = x + SLICE / 2
        canvas.rect(x, 63, SLICE - 2, 24, "pale blue", edge="blue")
        canvas.text(middle - 1, 80, f"slice {i}", size=12, anchor="middle")
        canvas.path([(middle - 1, 89), (middle - 1, 115)], "gray", arrow=True)
        canvas.rect(x + 4, 117, SLICE - 10, 42, "panel", edge="rule", radius=5)
        canvas.text(middle - 1, 143, f"block {i}", size=12, anchor="middle")
        canvas.path([(middle - 1, 159), (middle - 1, 179)], "orange")
    canvas.path([(LEFT + SLICE / 2 - 1, 179), (LEFT + SLICE * 7.5 - 1, 179)], "orange", width=2.5)
    canvas.text(
        LEFT + SLICE * 4,
        199,
        "distributed shared memory: each block sends its sums of a row, 48 bytes, to every block",
        color="orange",
        size=12.5,
        anchor="middle",
    )


def _block(canvas: Canvas) -> None:
    """One block: three buffers and three roles, with the barriers between them."""
    canvas.text(18, 246, "A block works on three rows at once", size=15, bold=True)
    canvas.rect(18, 262, 924, 194, "panel", edge="rule", radius=6)
    _role(canvas, 34, "copy", "1 warp")
    _role(canvas, 618, "compute", "1 to 16 warps")
    _role(canvas, 808, "finish", "1 warp")
    canvas.text(236, 290, "a ring of three buffers in shared memory", color="muted", size=12.5)
    buffers = (("row k", "gradient"), ("row k + 1", "sums"), ("row k + 2", "arriving"))
    fills = (("pale orange", "orange"), ("pale blue", "blue"), ("paper", "rule"))
    for i, ((row, state), (fill, edge)) in enumerate(zip(buffers, fills, strict=True)):
        x = 236 + 100 * i
        canvas.rect(x, 304, 92, 60, fill, edge=edge, radius=4)
        canvas.text(x + 46, 330, row, anchor="middle", bold=True)
        canvas.text(x + 46, 349, state, color="muted", size=12.5, anchor="middle")
    _arrow(canvas, 154, 230, 322, "full")
    _arrow(canvas, 230, 154, 352, "empty", above=False)
    _arrow(canvas, 536, 612, 322, "full")
    _arrow(canvas, 612, 536, 352, "empty", above=False)
    _arrow(canvas, 738, 802, 322, "partial")
    _arrow(canvas, 802, 738, 352, "plan", above=False)
    canvas.path([(868, 366), (868, 398)], "orange", arrow=True)
    canvas.path([(880, 398), (880, 366)], "orange", arrow=True)
    canvas.text(874, 416, "exchange with", color="orange", size=12.5, anchor="middle")
    canvas.text(874, 432, "the other blocks", color="orange", size=12.5, anchor="middle")
    canvas.path([(678, 366), (678, 398)], "gray", arrow=True)
    canvas.text(678, 416, "gradient of row k,", color="muted", size=12.5, anchor="middle")
    canvas.text(678, 432, "to global memory", color="muted", size=12.5, anchor="middle")
    canvas.path([(94, 398), (94, 366)], "gray", arrow=True)
    canvas.text(94, 416, "slice of row k + 2,", color="muted", size=12.5, anchor="middle")
    canvas.text(94, 432, "from global memory", color="muted", size=12.5, anchor="middle")
    canvas.text(
        382, 398, "Every labeled arrow is an mbarrier.", color="muted", size=12.5, anchor="middle"
    )
    canvas.text(
        382,
        416,
        "partial: the warps' sums; plan: the gradient's coefficients",
        color="muted",
        size=12.5,
        anchor="middle",
    )


def _role(canvas: Canvas, x: float, name: str, warps: str) -> None:
    canvas.rect(x, 304, 120, 60, "paper", edge="ink", radius=5)
    canvas.text(x + 60, 330, name, anchor="middle", bold=True)
    canvas.text(x + 60, 349, warps, color="muted", size=12.5, anchor="middle")


def _arrow(
    canvas: Canvas, start: float, end: float, y: float, barrier: str, *, above: bool = True
) -> None:
    canvas.path([(start, y), (end, y)], "gray", arrow=True)
    canvas.text((start + end) / 2, y - 6 if above else y + 15, barrier, size=12, anchor="middle")


def _time(canvas: Canvas) -> None:
    """What the three roles do, in order; lengths mean nothing."""
    canvas.text(18, 492, "In time (order, not durations)", size=15, bold=True)
    for name, top in LANES.items():
        canvas.text(LEFT - 14, top + 20, name, size=12.5, anchor="end")
    for i in range(3):
        row = _row(i + 1)
        _piece(canvas, "compute", 2 * i, 1, f"sums of {row}", "pale blue", "blue")
        _piece(canvas, "compute", 2 * i + 1, 1, f"gradient of {_row(i)}", "pale orange", "orange")
        _piece(canvas, "finish", 2 * i + 1, 0.94, f"merge {row}", "panel", "ink")
        _piece(canvas, "copy", 2 * i, 1.94, f"{_row(i + 2)} arrives", "panel", "rule")
    canvas.path([(LEFT, 630), (LEFT + 6 * SLOT, 630)], "muted", arrow=True)
    canvas.text(LEFT - 14, 634, "time", color="muted", size=12.5, anchor="end")


def _row(ahead: int) -> str:
    return f"k + {ahead}" if ahead else "k"


def _piece(
    canvas: Canvas, lane: str, slot: float, slots: float, words: str, fill: str, edge: str
) -> None:
    x, top = LEFT + SLOT * slot, LANES[lane]
    canvas.rect(x, top, SLOT * slots - 4, 30, fill, edge=edge, radius=4)
    canvas.text(x + (SLOT * slots - 4) / 2, top + 20, words, size=12.5, anchor="middle")
