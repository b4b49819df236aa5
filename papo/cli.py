"""The command line: arguments, one-line errors from rank 0, and the live progress."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from papo.config import ConfigError, TrainConfig, load_config
from papo.errors import PapoError

# The launcher kills every rank when one has failed: rank 0 is to have its say before the others go.
_GRACE_SECONDS = 2.0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, so that ranks do not each print them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of train.py.

    Raises:
        ConfigError: a missing or an unknown argument.
    """
    parser = _Parser(
        prog="train.py",
        description="Train a language model with PAPO under DeepSpeed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file of options (docs/config.md)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override an option; repeatable",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|never|FOLDER",
        help="continue from the newest checkpoint of the run (auto) or from a checkpoint's folder",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def config_from(argv: Sequence[str]) -> TrainConfig:
    """The config that the arguments describe.

    Raises:
        ConfigError: bad arguments or options.
    """
    args = parse_args(argv)
    config = load_config(args.config, args.overrides)
    return config.model_copy(update={"resume": args.resume}) if args.resume else config


def main(argv: Sequence[str] | None = None) -> int:
    """Train; the exit status: 0, or 1 on every rank after an error that rank 0 prints as one line,
    130 after Ctrl-C."""
    leads = _rank() == 0
    _log_to_stderr(logging.INFO if leads else logging.CRITICAL)
    try:
        config = config_from(sys.argv[1:] if argv is None else argv)
        from papo.loop import run

        return run(config)
    except PapoError as error:
        if leads:
            line = " ".join(str(error).splitlines())  # it may quote a library's
            print(f"error: {line}", file=sys.stderr, flush=True)
        else:
            time.sleep(_GRACE_SECONDS)
        return 1
    except KeyboardInterrupt:
        return 130


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


class _StderrHandler(logging.Handler):
    """Writes to what sys.stderr is at the time: the progress display replaces it while it is
    live."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _log_to_stderr(level: int) -> None:
    logger = logging.getLogger("papo")
    logger.setLevel(level)
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


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
