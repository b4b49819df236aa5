"""The run's figures on disk: metrics.jsonl and TensorBoard, and completions.jsonl.

Written by rank 0 alone, every row once, also across kill and resume.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from papo.errors import PapoError
from papo.record.metric_names import METRICS

log = logging.getLogger(__name__)


class JsonLines:
    """A file of one JSON object a line, each with a `step`. A line that a killed process left
    unfinished is dropped.

    Args:
        path: created with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        if path.exists():
            self.keep(lambda row: True)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows and hand them to the operating system: they survive the process.

        Raises:
            PapoError: they cannot be written (disk full, folder gone).
        """
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (kept open)
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Keep the rows for which `wanted` is true; the file is replaced whole or not at all."""
        if not self.path.exists():
            return
        self.close()
        before = self.path.read_bytes()
        after = "".join(
            line for line in _lines(before) if (row := _row(line)) is not None and wanted(row)
        ).encode()
        if after == before:
            return
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            partial.write_bytes(after)
            os.replace(partial, self.path)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a write that has failed, and was told, before
                self._file.close()
            self._file = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The finished rows of a file, none where there is no file."""
    if not path.exists():
        return []
    return [row for line in _lines(path.read_bytes()) if (row := _row(line)) is not None]


def _lines(data: bytes) -> list[str]:
    """The finished lines. `splitlines` would also cut a completion's text, at U+2028 and others."""
    *finished, _cut_off = data.decode("utf-8", errors="replace").split("\n")
    return [line + "\n" for line in finished]


def _row(line: str) -> dict[str, Any] | None:
    """The row of a line; None where it holds none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _cannot_write(path: Path, error: OSError) -> PapoError:
    return PapoError(
        f"cannot write {path}: {error.strerror}; free some space or choose another output_dir"
    )


def _row_id(row: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    return row["step"], frozenset(row)


class MetricsWriter:
    """Figures of steps and evaluations to metrics.jsonl and TensorBoard.

    Args:
        run_dir: folder of the run; it exists.
        tensorboard: also write `run_dir/tensorboard`.
        enabled: False on every rank but 0: all methods then do nothing.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, enabled: bool) -> None:
        self._lines = JsonLines(run_dir / "metrics.jsonl") if enabled else None
        self._folder = run_dir / "tensorboard" if enabled and tensorboard else None
        self._board: Any = None
        self._resumed_after: int | None = None
        self._written = self._row_ids()

    def _row_ids(self) -> set[tuple[int, frozenset[str]]]:
        """Step and names of every row in the file: what makes a row the same row."""
        return {_row_id(row) for row in read_rows(self._lines.path)} if self._lines else set()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row. A figure that is not finite becomes null. A row of the same step and names is
        replaced.

        Raises:
            ValueError: a name that `METRICS` does not document.
            PapoError: the row cannot be written.
        """
        unknown = sorted(set(values) - set(METRICS))
        if unknown:
            raise ValueError(
                f"values: expected names in papo.record.metric_names.METRICS, got {unknown}"
            )
        if self._lines is None:
            return
        row: dict[str, Any] = {"step": step}
        row |= {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        if _row_id(row) in self._written:
            self._lines.keep(lambda old: _row_id(old) != _row_id(row))
        self._lines.append([row])
        self._written.add(_row_id(row))
        if self._folder is not None:
            try:
                board = self._open_board()
                for name, value in values.items():
                    board.add_scalar(name, value, step)
                board.flush()
            except OSError as error:
                raise _cannot_write(self._folder, error) from error

    def _open_board(self) -> Any:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if self._resumed_after is None else self._resumed_after + 1
            self._board = SummaryWriter(str(self._folder), purge_step=purge)
        return self._board

    def truncate_after(self, step: int) -> None:
        """Drop what was written after `step`, before a resumed run writes it again; -1 drops
        everything."""
        if self._lines is not None:
            self._lines.keep(lambda row: row["step"] <= step)
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


class CompletionsWriter:
    """Every sampled completion as a row of completions.jsonl.

    Args:
        run_dir: folder of the run; it exists.
        enabled: False on every rank but 0, and where completions are not wanted.
    """

    def __init__(self, run_dir: Path, enabled: bool) -> None:
        self._lines = JsonLines(run_dir / "completions.jsonl") if enabled else None

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows of a step (keys of `telemetry.completion_rows`); `step` is added.

        Raises:
            PapoError: they cannot be written.
        """
        if self._lines is not None:
            self._lines.append({"step": step, **row} for row in rows)

    def truncate_after(self, step: int) -> None:
        """Drop the rows of steps after `step`; -1 drops everything."""
        if self._lines is not None:
            self._lines.keep(lambda row: row["step"] <= step)

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()
