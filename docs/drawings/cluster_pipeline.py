"""How a cluster of blocks keeps a row on chip: slices, buffers, roles, and their order in time."""

from __future__ import annotations

from collections.abc import Sequence

from .svg import Canvas, Point

WIDTH, HEIGHT = 960, 738
BLOCKS = 8
LEFT, SLICE = 148, 98  # the row's left edge; a slice's width
LANES = {"copy": 556, "sum": 596, "finish": 636, "write": 676}  # tops of the lanes of time
SLOT = 128  # width of a piece of work in time


def draw() -> str:
    """The drawing as SVG."""
    canvas = Canvas(
        WIDTH,
        HEIGHT,
        "Diagram: a row of 151,936 bfloat16 logits is cut into eight slices, one for each block of "
        "a cluster. In a block a copy warp, warps that sum, a finish warp and warps that write "
        "gradients work on three rows.",
    )
    _cluster(canvas)
    _block(canvas)
    _time(canvas)
    return canvas.svg()


def _cluster(canvas: Canvas) -> None:
    """The row in slices, the blocks they go to, the messages between the blocks."""
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
        "row k is finished by block k mod 8: each warp sends it 32 bytes of sums, and it sends "
        "every block 32 bytes of plan",
        color="orange",
        size=12.5,
        anchor="middle",
    )


def _block(canvas: Canvas) -> None:
    """One block: three buffers and four roles, with the barriers between them."""
    canvas.text(18, 246, "A block works on three rows at once", size=15, bold=True)
    canvas.rect(18, 262, 924, 240, "panel", edge="rule", radius=6)
    _role(canvas, 34, 336, "copy", "1 warp")
    _role(canvas, 618, 290, "sum", "1 to 8 warps")
    _role(canvas, 618, 386, "write", "as many")
    _role(canvas, 808, 338, "finish", "1 warp")
    canvas.text(236, 322, "a ring of three buffers in shared memory", color="muted", size=12.5)
    buffers = (("row k", "gradient"), ("row k + 1", "sums"), ("row k + 2", "arriving"))
    fills = (("pale orange", "orange"), ("pale blue", "blue"), ("paper", "rule"))
    for i, ((row, state), (fill, edge)) in enumerate(zip(buffers, fills, strict=True)):
        x = 236 + 100 * i
        canvas.rect(x, 336, 92, 60, fill, edge=edge, radius=4)
        canvas.text(x + 46, 362, row, anchor="middle", bold=True)
        canvas.text(x + 46, 381, state, color="muted", size=12.5, anchor="middle")
    _arrow(canvas, [(156, 366), (230, 366)], "full", (193, 360))
    _arrow(canvas, [(534, 356), (570, 356), (570, 320), (612, 320)], "full", (592, 314))
    _arrow(canvas, [(534, 376), (570, 376), (570, 416), (612, 416)], "full", (592, 410))
    _arrow(canvas, [(650, 448), (650, 470), (94, 470), (94, 400)], "empty", (382, 464))
    _arrow(canvas, [(740, 320), (868, 320), (868, 334)], "messages", (804, 314))
    _arrow(canvas, [(868, 400), (868, 416), (744, 416)], "plan", (804, 410))
    canvas.path([(904, 294), (904, 334)], "orange", arrow=True)
    canvas.text(934, 286, "and of the other blocks", color="orange", size=12.5, anchor="end")
    canvas.path([(904, 400), (904, 440)], "orange", arrow=True)
    canvas.text(934, 458, "and to the other blocks", color="orange", size=12.5, anchor="end")
    canvas.path([(94, 306), (94, 330)], "gray", arrow=True)
    canvas.text(34, 282, "slice of row k + 2,", color="muted", size=12.5)
    canvas.text(34, 298, "from global memory", color="muted", size=12.5)
    canvas.path([(700, 448), (700, 474)], "gray", arrow=True)
    words = "gradient of row k, to global memory"
    canvas.text(700, 490, words, color="muted", size=12.5, anchor="middle")
    for y, words in (
        (418, "Every labeled arrow is an mbarrier."),
        (436, "messages: the warps' sums; plan: the gradient's coefficients"),
    ):
        canvas.text(382, y, words, color="muted", size=12.5, anchor="middle")


def _role(canvas: Canvas, x: float, y: float, name: str, warps: str) -> None:
    canvas.rect(x, y, 120, 60, "paper", edge="ink", radius=5)
    canvas.text(x + 60, y + 26, name, anchor="middle", bold=True)
    canvas.text(x + 60, y + 45, warps, color="muted", size=12.5, anchor="middle")


def _arrow(canvas: Canvas, points: Sequence[Point], barrier: str, at: Point) -> None:
    canvas.path(points, "gray", arrow=True)
    canvas.text(*at, barrier, size=12, anchor="middle")


def _time(canvas: Canvas) -> None:
    """What the four roles do, in order; lengths mean nothing."""
    canvas.text(18, 540, "In time (order, not durations)", size=15, bold=True)
    for name, top in LANES.items():
        canvas.text(LEFT - 14, top + 20, name, size=12.5, anchor="end")
    for i in range(3):
        row, at = _row(i + 1), 2 * i
        _piece(canvas, "copy", at, 1.94, f"{_row(i + 2)} arrives", "panel", "rule")
        _piece(canvas, "sum", at, 1.3, f"sums of {row}", "pale blue", "blue")
        _piece(canvas, "finish", at + 1.3, 0.8 if i < 2 else 0.7, row, "panel", "ink")
        _piece(canvas, "write", at + 0.1, 1.5, f"gradient of {_row(i)}", "pale orange", "orange")
    canvas.path([(LEFT, 718), (LEFT + 6 * SLOT, 718)], "muted", arrow=True)
    canvas.text(LEFT - 14, 722, "time", color="muted", size=12.5, anchor="end")


def _row(ahead: int) -> str:
    return f"k + {ahead}" if ahead else "k"


def _piece(
    canvas: Canvas, lane: str, slot: float, slots: float, words: str, fill: str, edge: str
) -> None:
    x, top = LEFT + SLOT * slot, LANES[lane]
    canvas.rect(x, top, SLOT * slots - 4, 30, fill, edge=edge, radius=4)
    canvas.text(x + (SLOT * slots - 4) / 2, top + 20, words, size=12.5, anchor="middle")
