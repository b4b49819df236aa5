"""From a sweep's notes to rows of the table that the launchers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_check.sweep import DEFAULT, ranked, winner
from papo_kernels.backends import tuning

# The columns below a measured number that its winner serves too, as a share of it: there the same
# numbers cut rows into somewhat shorter pieces.
REACH = 0.5


def rank(result: dict[str, Any]) -> None:
    """Adds to every task of a sweep its candidates, best first, as far as it came."""
    for entry in result.get("tasks", {}).values():
        entry["ranking"] = ranked(entry["tried"])


class Won(NamedTuple):
    """The fields of the table's configuration that were won at a number of columns, and up to
    which one they hold."""

    columns: int
    last: int
    config: dict[str, Any]


def won(result: dict[str, Any]) -> dict[tuple[str, str], list[Won]]:
    """By backend and dtype, fewer columns first."""
    found: dict[tuple[str, str], dict[int, Won]] = {}
    for entry in result.get("tasks", {}).values():
        best = winner(entry["tried"])
        if best == DEFAULT:
            continue
        columns, last = entry["columns"], entry["last column"]
        same = found.setdefault((entry["backend"], entry["dtype"]), {})
        before = same.get(columns, Won(columns, last, {}))
        config = {**before.config, **parsed(entry["field"], best)}
        same[columns] = Won(columns, min(before.last, last), config)
    return {key: [same[columns] for columns in sorted(same)] for key, same in found.items()}


def parsed(field: str, candidate: str) -> dict[str, Any]:
    """What a candidate sets, as the table holds it."""
    if field == "config":
        pairs = (pair.split("=") for pair in candidate.split(","))
        return {key: int(value) for key, value in pairs}
    return {field: [int(number) for number in candidate.split(",")]}


def rows(result: dict[str, Any], source: dict[str, str]) -> dict[str, list[tuning.Row]]:
    """The new rows of each backend. A winner serves the columns down to half of what it was
    measured at, or to those that the one before serves."""
    made: dict[str, list[tuning.Row]] = {}
    device, *_ = names = tuple(result["devices"])
    for (backend, dtype), configs in won(result).items():
        end = 0
        for i, (columns, last, config) in enumerate(configs):
            first = max(int(columns * REACH), end) + 1
            end = min([last, *(other.columns - 1 for other in configs[i + 1 : i + 2])])
            current = next(
                row.config
                for row in tuning.load()[backend]
                if row.matches(names, dtype, columns) and not row.measured
            )
            row = tuning.Row(device, dtype, (first, end), {**current, **config}, source)
            made.setdefault(backend, []).append(row)
    return made


def save(results: list[dict[str, Any]], source: dict[str, str], path: Path) -> dict[str, int]:
    """Writes the package's table with the winners in front, and says how many there are."""
    table = tuning.load()
    counts: dict[str, int] = {}
    for result in results:
        for backend, new in rows(result, {**source, "device": result["devices"][0]}).items():
            counts[backend] = len(new)
            for row in reversed(new):
                table[backend] = tuning.insert(table[backend], row)
    if counts:
        tuning.save(table, path)
    return counts
