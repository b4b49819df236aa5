"""The command line: its arguments, and errors of one line."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from papo import preflight
from papo.config import ConfigError, TrainConfig, load_config
from papo.dist import environment, peers, termination
from papo.dist.peers import PeerError
from papo.dist.termination import SILENT_SECONDS
from papo.errors import PapoError, first_line, one_line


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors, so that not every rank prints them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of train.py.

    Raises:
        ConfigError: an argument is missing or unknown.
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
    parser.add_argument(
        "--resume-anyway",
        action="store_const",
        const=True,
        help="with --resume, go on although options, problems or model are not the checkpoint's",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def config_from(argv: Sequence[str]) -> TrainConfig:
    """The config that the arguments ask for.

    Raises:
        ConfigError: an argument or an option is bad.
    """
    args = parse_args(argv)
    arguments = {"resume": args.resume, "resume_anyway": args.resume_anyway}
    given = {name: value for name, value in arguments.items() if value is not None}
    config = load_config(args.config, args.overrides, given)
    if config.resume_anyway and config.resume == "never":
        raise ConfigError(
            "resume_anyway=true: expected --resume auto or the folder of a checkpoint beside it"
        )
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Train.

    Returns:
        The exit status: 0, or 1 on every rank after an error, which is one line on the screen:
        rank 0's, unless another rank met what nobody foresaw.
    """
    _silence_what_outlives_a_rank()
    leads, first_here, folder = True, True, None
    try:
        place = environment.place()
        leads, first_here = place.rank == 0, place.local_rank == 0
        _log_to_stderr(logging.INFO if leads else logging.CRITICAL)
        config = config_from(sys.argv[1:] if argv is None else argv)
        folder = Path(config.output_dir)
        preflight.check(config)
        from papo.train.loop import run

        return run(config)
    except PeerError as error:
        peers.leave(error)
    except PapoError as error:
        # Before the ranks have met, rank 0 may find nothing on its own machine.
        if leads or (first_here and not peers.met):
            _print_error(str(error))
        else:
            time.sleep(SILENT_SECONDS)
            # The launcher would have ended this rank if rank 0 had failed.
            if termination.PROCESS.launched and not peers.met:
                _print_error(str(error))
    except Exception as error:
        _print_error(_unforeseen(error, folder))
    return 1


def _silence_what_outlives_a_rank() -> None:
    """Of a rank that is killed: torch adds a stack trace to each lost connection in the others, and
    Python's resource tracker warns of the semaphores that it then removes."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    filters = (os.environ.get("PYTHONWARNINGS", ""), "ignore:resource_tracker:UserWarning")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, filters))


def _unforeseen(error: Exception, folder: Path | None) -> str:
    """The line for an error that is a bug, whose traceback goes into a file.

    Args:
        folder: of the run; the file is in the temporary folder where that does not exist.
    """
    text = "".join(traceback.format_exception(error))
    name = f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    where = "could not be written"
    for place in (folder, Path(tempfile.gettempdir())):
        if place is not None and place.is_dir():
            with contextlib.suppress(OSError):
                (place / name).write_text(text, errors="backslashreplace")
                where = f"is in {place / name}"
                break
    try:
        what = first_line(error)
    except Exception:  # its text is a program too
        what = "(no text)"
    return f"unexpected {type(error).__name__}: {what}; the traceback {where}"


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"error: {one_line(text)}", file=sys.stderr, flush=True)


class _StderrHandler(logging.Handler):
    """Writes to the current sys.stderr: the progress display replaces it while it is live."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            print(one_line(self.format(record)), file=sys.stderr, flush=True)


def _log_to_stderr(level: int) -> None:
    logger = logging.getLogger("papo")
    logger.setLevel(level)
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
