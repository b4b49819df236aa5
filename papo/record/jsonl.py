"""A file of rows that grows a line at a time, survives a kill, and can be cut back."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from papo.errors import PapoError


class JsonLines:
    """A file with one JSON object a line, each with a `step`.

    A line that a killed process left unfinished is dropped.

    Args:
        path: created with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
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
            raise cannot_write(self.path, error) from error

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
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of an earlier write that failed, as was reported
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


def cannot_write(path: Path, error: OSError) -> PapoError:
    """The one line for a file of the run's folder that cannot be written."""
    return PapoError(
        f"cannot write {path}: {error.strerror}; free some space or choose another output_dir"
    )
