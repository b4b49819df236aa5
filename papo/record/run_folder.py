"""The run's folder: made ready for a run, or moved aside where another run's results are in it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from papo.errors import PapoError

if TYPE_CHECKING:
    from papo.config import TrainConfig

CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"


def prepare(config: TrainConfig, resumed: Path | None) -> Path | None:
    """Make `output_dir` with the resolved config in it; what another run left there moves aside.

    Args:
        resumed: the checkpoint that the run goes on from, if any.

    Returns:
        Where an earlier run's folder is now, None where there was none.

    Raises:
        PapoError: the folder cannot be made.
    """
    folder, earlier = Path(config.output_dir), None
    try:
        if _holds_another_run(folder, config.resume, resumed):
            numbers = itertools.count(1)
            aside = (folder.with_name(f"{folder.name}.{n}") for n in numbers)
            earlier = folder.rename(next(p for p in aside if not p.exists()))
        folder.mkdir(parents=True, exist_ok=True)
        config.dump_yaml(folder / "config.yaml")
    except OSError as error:
        raise PapoError(
            f"output_dir={config.output_dir!r}: {error.strerror}; "
            "free some space or choose another output_dir"
        ) from error
    return earlier


def _holds_another_run(folder: Path, resume: str, resumed: Path | None) -> bool:
    """Whether the folder has results that this run does not go on from."""
    if resume == "auto":
        return False
    if resumed is not None and resumed.resolve().parent == (folder / CHECKPOINTS).resolve():
        return False
    return any((folder / name).exists() for name in (METRICS_FILE, CHECKPOINTS))
