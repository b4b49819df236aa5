"""The run's figures on disk, metrics.jsonl and TensorBoard.

Written by rank 0 alone, every row once, also across kill and resume.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papo.record.jsonl import JsonLines, RowId, cannot_write, read_rows, row_id
from papo.record.metric_names import METRICS, documented_as
from papo.record.run_folder import METRICS_FILE

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricsWriter:
    """Figures of steps and evaluations to metrics.jsonl and TensorBoard.

    Args:
        run_dir: folder of the run; it exists.
        tensorboard: also write `run_dir/tensorboard`.
        enabled: False on every rank but 0: all methods then do nothing.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, enabled: bool) -> None:
        self._lines = JsonLines(run_dir / METRICS_FILE) if enabled else None
        self._folder = run_dir / "tensorboard" if enabled and tensorboard else None
        self._board: SummaryWriter | None = None
        self._resumed_after: int | None = None
        self._written = self._row_ids()

    def _row_ids(self) -> set[RowId]:
        """Of every row in the file."""
        return {row_id(row) for row in read_rows(self._lines.path)} if self._lines else set()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row. A figure that is not finite becomes null. A row of the same step and names is
        replaced.

        Raises:
            ValueError: a name that `METRICS` does not document.
            PapoError: the row cannot be written.
        """
        unknown = sorted(name for name in values if documented_as(name) not in METRICS)
        if unknown:
            raise ValueError(
                f"values: expected names in papo.record.metric_names.METRICS, got {unknown}"
            )
        if self._lines is None:
            return
        row: dict[str, Any] = {"step": step}
        row |= {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        if row_id(row) in self._written:
            self._lines.drop(row_id(row))
        self._lines.append([row])
        self._written.add(row_id(row))
        if self._folder is not None:
            try:
                board = self._open_board()
                for name, value in values.items():
                    board.add_scalar(name, value, step)
                board.flush()
            except OSError as error:
                raise cannot_write(self._folder, error) from error

    def _open_board(self) -> SummaryWriter:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if self._resumed_after is None else self._resumed_after + 1
            self._board = SummaryWriter(str(self._folder), purge_step=purge)
        return self._board

    def truncate_after(self, step: int) -> None:
        """Drop what was written after `step`, before a resumed run writes it again; -1 drops
        everything."""
        if self._lines is not None:
            self._lines.keep_up_to(step)
            self._written = self._row_ids()
            self._resumed_after = step

    def close(self) -> None:
        """Close the files."""
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
            self._board = None
