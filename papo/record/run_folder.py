"""The run's folder: made ready for a run, or moved aside where another run's results are in it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from papo.record.lock import FolderLock, cannot_use

if TYPE_CHECKING:
    from papo.config import TrainConfig

CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"


def prepare(lock: FolderLock, config: TrainConfig, resumed: Path | None) -> Path | None:
    """Write the resolved config into `output_dir`; what another run left there moves aside.

    Args:
        lock: on the folder.
        resumed: the checkpoint that the run goes on from, if any.

    Returns:
        Where an earlier run's folder is now, None where there was none.

    Raises:
        PapoError: the folder cannot be moved or written to.
    """
    folder, earlier = lock.folder, None
    try:
        if _holds_another_run(folder, config.resume, resumed):
            earlier = lock.move_aside()
        config.dump_yaml(folder / "config.yaml")
    except (OSError, ValueError) as error:  # ValueError: "." has no name to move to
        raise cannot_use(folder, error) from error
    return earlier


def check(config: TrainConfig, resumed: Path | None) -> None:
    """Refuse early what `prepare` could not move aside.

    Raises:
        PapoError: the folder that holds `output_dir` is not writable.
    """
    folder = Path(config.output_dir)
    moves = _holds_another_run(folder, config.resume, resumed)
    if moves and not os.access(folder.parent, os.W_OK):
        reason = f"an earlier run cannot move aside, {folder.parent} is not writable"
        raise cannot_use(folder, PermissionError(errno.EACCES, reason))


def _holds_another_run(folder: Path, resume: str, resumed: Path | None) -> bool:
    """Whether the folder has results that this run does not go on from."""
    if resume == "auto":
        return False
    if resumed is not None and resumed.resolve().parent == (folder / CHECKPOINTS).resolve():
        return False
    return any((folder / name).exists() for name in (METRICS_FILE, CHECKPOINTS))
