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
        # A run that is started from this file begins anew, unless its command line says otherwise.
        plain = config.model_copy(update={"resume": "never", "resume_anyway": False})
        plain.dump_yaml(folder / "config.yaml")
    except (OSError, ValueError) as error:  # ValueError: "." has no name to move to
        raise cannot_use(folder, error) from error
    return earlier


def check(config: TrainConfig, resumed: Path | None) -> None:
    """Refuse early what `prepare` could not move aside, and checkpoints that cannot be seen.

    Raises:
        PapoError: an earlier run cannot move aside, or `checkpoints` is no folder.
    """
    folder = Path(config.output_dir).resolve()
    checkpoints = folder / CHECKPOINTS
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        reason = f"{CHECKPOINTS} is no folder (a link whose disk is not mounted?)"
        raise cannot_use(folder, NotADirectoryError(errno.ENOTDIR, reason))
    if not _holds_another_run(folder, config.resume, resumed):
        return
    stays = ""
    if not os.access(folder.parent, os.W_OK):
        stays = f"{folder.parent} is not writable"
    elif folder.is_mount():
        stays = "its folder is a mount point"
    elif Path.cwd().is_relative_to(folder):
        stays = "the current folder is in it"
    elif resumed is not None and resumed.resolve().is_relative_to(folder):
        stays = f"resume={config.resume!r} is in it, but not among its {CHECKPOINTS}"
    if stays:
        reason = f"an earlier run cannot move aside: {stays}"
        raise cannot_use(folder, PermissionError(errno.EACCES, reason))


def _holds_another_run(folder: Path, resume: str, resumed: Path | None) -> bool:
    """Whether the folder has results that this run does not go on from."""
    if resume == "auto":
        return False
    if resumed is not None and resumed.resolve().parent == (folder / CHECKPOINTS).resolve():
        return False
    return any((folder / name).exists() for name in (METRICS_FILE, CHECKPOINTS))
