"""Live progress of a run on the screen."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from papo.policy.prediction import PREDICTIONS, correlation_of
from papo.record.screen import showing

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Progress:
    """Live progress: a rich bar on a terminal, a line a step elsewhere.

    Args:
        enabled: False on every rank but 0: all methods then do nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._total = 0
        self._bar: Bar | None = None
        self._began = 0.0
        self._durations: deque[float] = deque(maxlen=10)

    def start(self, total: int, done: int = 0) -> None:
        """Begin a run of `total` steps; a resumed run has `done` of them behind it."""
        self._total = total
        self._began = time.monotonic()
        if not self._enabled or not sys.stdout.isatty():
            return
        from rich import progress as rich

        columns = (rich.BarColumn(bar_width=24), rich.TextColumn("{task.description}"))
        bar = rich.Progress(*columns)
        with showing():
            bar.start()
            bar.add_task(f"step {done}/{total}", total=total, completed=done)
            self._bar = bar

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step."""
        now = time.monotonic()
        self._durations.append(now - self._began)
        self._began = now
        if not self._enabled:
            return
        line = step_line(step, self._total, metrics, self._eta(step))
        with showing():
            if self._bar is None:
                print(line, flush=True)
            else:
                self._bar.update(self._bar.task_ids[0], completed=step, description=line)

    def _eta(self, step: int) -> float:
        """Seconds left, from the median of the last steps: evaluations and checkpoints fall between
        some of them."""
        ordered = sorted(self._durations)
        return ordered[len(ordered) // 2] * max(0, self._total - step)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._enabled:
            return
        with showing():
            if self._bar is None:
                print(text, flush=True)
            else:
                self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            with showing():
                self._bar.stop()
            self._bar = None


def step_line(step: int, total: int, metrics: Mapping[str, float], eta: float) -> str:
    """A step in one line: reward, entropy, phase, tokens/s and the time left.

    How well entropy changes were predicted is among them once it is known: to first order in the
    weights, or by polarity where that is not predicted.
    """
    correlations = (metrics.get(correlation_of(name), math.nan) for name in PREDICTIONS)
    known = next(filter(math.isfinite, correlations), math.nan)
    predicted = f"dH r {known:+.2f}  " if math.isfinite(known) else ""
    return (
        f"step {step}/{total}  reward {_figure(metrics['reward/mean'])}  entropy "
        f"{_figure(metrics['entropy/mean'])}  "
        f"phase {metrics['phase/phi']:+.2f}  {predicted}"
        f"{metrics['throughput/tokens_per_second']:.0f} tok/s  ETA {clock_text(eta)}"
    )


def _figure(value: float) -> str:
    """Three decimals; a dash for a mean over nothing."""
    return f"{value:.3f}" if math.isfinite(value) else "-"


def clock_text(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
