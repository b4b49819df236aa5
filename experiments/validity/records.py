"""Raw records: rows that are appended as they are measured, and what they were measured with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from papo.errors import PapoError
from papo.outputs import replace_file

Row = dict[str, Any]


def rows(path: Path) -> list[Row]:
    """The finished lines of a file; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Records:
    """A file of rows, one batch after the other, that a study goes on from.

    A batch that a killed study left unfinished is dropped.

    Args:
        path: of the file, made with its first batch.
        settings: what the rows are measured with, JSON-able; kept in a file beside.

    Attributes:
        done: the batches that are there.

    Raises:
        PapoError: the rows that are there were measured with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".settings.json")
        wanted = json.loads(json.dumps(settings))
        found = rows(path)
        if found:
            before = json.loads(beside.read_text()) if beside.exists() else None
            if before != wanted:
                raise PapoError(
                    f"{path}: measured with other settings than now ({beside.name}); give another "
                    "folder with --records, or remove the file"
                )
        replace_file(beside, json.dumps(wanted, indent=1).encode())
        counts = Counter(row["batch"] for row in found)
        whole = [row for row in found if counts[row["batch"]] == row["of"]]
        self.done = {row["batch"] for row in whole}
        if path.exists():
            replace_file(path, _lines(whole).encode())

    def append(self, batch: int, measured: Sequence[Row]) -> None:
        """All rows of a batch."""
        text = _lines([{"batch": batch, "of": len(measured), **row} for row in measured])
        with self._path.open("a") as file:
            file.write(text)
        self.done.add(batch)


def _lines(records: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in records)
