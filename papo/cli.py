"""The command line: its arguments, and one-line errors from rank 0."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from papo import preflight
from papo.config import ConfigError, TrainConfig, load_config
from papo.errors import PapoError

# The launcher kills all ranks once one has failed, so the others leave time for rank 0's error.
_GRACE_SECONDS = 2.0


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
        action="store_true",
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
    config = load_config(args.config, args.overrides)
    given = {"resume": args.resume, "resume_anyway": args.resume_anyway}
    config = config.model_copy(update={name: value for name, value in given.items() if value})
    if config.resume_anyway and config.resume == "never":
        raise ConfigError(
            "resume_anyway=true: expected --resume auto or the folder of a checkpoint beside it"
        )
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Train.

    Returns:
        The exit status: 0, 1 on every rank after an error that rank 0 prints as one line, or 130
        after Ctrl-C.
    """
    leads = _rank() == 0
    _log_to_stderr(logging.INFO if leads else logging.CRITICAL)
    try:
        config = config_from(sys.argv[1:] if argv is None else argv)
        preflight.check(config)
        from papo.train.loop import run

        return run(config)
    except PapoError as error:
        if leads:
            line = " ".join(str(error).splitlines())  # a quoted error of a library may have several
            print(f"error: {line}", file=sys.stderr, flush=True)
        else:
            time.sleep(_GRACE_SECONDS)
        return 1
    except KeyboardInterrupt:
        return 130


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


class _StderrHandler(logging.Handler):
    """Writes to the current sys.stderr: the progress display replaces it while it is live."""

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
