"""Live progress of a run: a bar on a terminal, a line a step elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any


class Progress:
    """Live progress: a rich bar on a terminal, a line a step elsewhere.

    Args:
        enabled: False on every rank but 0: all methods then do nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._total = 0
        self._bar: Any = None
        self._task: Any = None
        self._began = 0.0
        self._durations: deque[float] = deque(maxlen=10)

    def start(self, total: int, done: int = 0) -> None:
        """Begin a run of `total` steps, `done` of which a resumed run has behind it."""
        self._total = total
        self._began = time.monotonic()
        if not self._enabled or not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(BarColumn(bar_width=24), TextColumn("{task.description}"))
        self._bar.start()
        self._task = self._bar.add_task(f"step {done}/{total}", total=total, completed=done)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step."""
        now = time.monotonic()
        self._durations.append(now - self._began)
        self._began = now
        if not self._enabled:
            return
        line = step_line(step, self._total, metrics, self._eta(step))
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.update(self._task, completed=step, description=line)

    def _eta(self, step: int) -> float:
        """Seconds left, from the median of the last steps (evaluations and checkpoints fall between
        them)."""
        ordered = sorted(self._durations)
        return ordered[len(ordered) // 2] * max(0, self._total - step)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._enabled:
            return
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def step_line(step: int, total: int, metrics: Mapping[str, float], eta: float) -> str:
    """Step, reward, entropy, phase, how well entropy changes were predicted (once that is known),
    tokens/s and the time left, in one line."""
    correlation = metrics.get("entropy/prediction_correlation", math.nan)
    predicted = f"dH r {correlation:+.2f}  " if math.isfinite(correlation) else ""
    return (
        f"step {step}/{total}  reward {metrics['reward/mean']:.3f}  entropy "
        f"{metrics['entropy/mean']:.3f}  "
        f"phase {metrics['phase/phi']:+.2f}  {predicted}"
        f"{metrics['throughput/tokens_per_second']:.0f} tok/s  ETA {clock_text(eta)}"
    )


def clock_text(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
