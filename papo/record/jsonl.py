"""A file of rows that grows a line at a time, survives a kill, and can be cut back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from papo.errors import PapoError
from papo.outputs import replace_file

RowId = tuple[int, frozenset[str]]


class JsonLines:
    """A file with one JSON object a line, each with a `step`.

    A line that a killed process left unfinished is dropped.

    Args:
        path: created with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._rewrite(line for line, _ in _rows(path))

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows and hand them to the operating system: they survive the process.

        Raises:
            PapoError: they cannot be written (disk full, folder gone).
        """
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            if self._file is None:
                # Half of a surrogate pair becomes `\ud800`, as JSON escapes it.
                self._file = open(  # noqa: SIM115 (kept open)
                    self.path, "a", encoding="utf-8", errors="backslashreplace"
                )
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def keep_up_to(self, step: int) -> None:
        """Drop the rows of steps after `step`; -1 drops everything.

        Raises:
            PapoError: the file cannot be written; it is as it was.
        """
        self._rewrite(line for line, row in _rows(self.path) if row["step"] <= step)

    def drop(self, same: RowId) -> None:
        """Drop the rows with this id.

        Raises:
            PapoError: as for `keep_up_to`.
        """
        self._rewrite(line for line, row in _rows(self.path) if row_id(row) != same)

    def _rewrite(self, lines: Iterable[str]) -> None:
        """Make `lines` the file's content."""
        after = "".join(lines).encode()
        if not self.path.exists() or after == self.path.read_bytes():
            return
        self.close()
        try:
            replace_file(self.path, after)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of an earlier write that failed, as was reported
                self._file.close()
            self._file = None


def cannot_write(path: Path, error: OSError) -> PapoError:
    """The one line for a file of the run's folder that cannot be written."""
    return PapoError(
        f"cannot write {path}: {error.strerror}; free some space or choose another output_dir"
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The finished rows of a file, none where there is no file."""
    return [row for _, row in _rows(path)]


def row_id(row: Mapping[str, Any]) -> RowId:
    """What makes a row the same row: its step and its names."""
    return row["step"], frozenset(row)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The finished lines of a file that hold a row, and their rows."""
    if not path.exists():
        return
    # `splitlines` would also cut a completion's text, at U+2028 and others.
    *finished, _cut_off = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    for line in finished:
        row = _row(line)
        if row is not None:
            yield line + "\n", row


def _row(line: str) -> dict[str, Any] | None:
    """The row of a line; None where it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # JSON's own errors, and integers of too many digits
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
