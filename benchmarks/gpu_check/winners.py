"""From a sweep's notes to rows of the table that the launchers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu_check.sweep import DEFAULT, ranked, winner
from papo_kernels import tuning

# The columns below a measured number that its winner serves too, as a share of it: there the same
# numbers cut rows into somewhat shorter pieces.
REACH = 0.5


def rank(result: dict[str, Any]) -> None:
    """Adds to every task of a sweep its candidates, best first, as far as it came."""
    for entry in result.get("tasks", {}).values():
        entry["ranking"] = ranked(entry["tried"])


def configurations(result: dict[str, Any]) -> dict[tuple[str, str, int, int], dict[str, Any]]:
    """{(backend, dtype, columns, last column): the fields that were won}."""
    found: dict[tuple[str, str, int, int], dict[str, Any]] = {}
    lasts: dict[tuple[str, str, int], int] = {}
    fields: dict[tuple[str, str, int], dict[str, Any]] = {}
    for entry in result.get("tasks", {}).values():
        best = winner(entry["tried"])
        if best == DEFAULT:
            continue
        key = (entry["backend"], entry["dtype"], entry["columns"])
        lasts[key] = min(lasts.get(key, entry["last column"]), entry["last column"])
        fields.setdefault(key, {}).update(parsed(entry["field"], best))
    for key, config in fields.items():
        found[(*key, lasts[key])] = config
    return found


def parsed(field: str, candidate: str) -> dict[str, Any]:
    """A candidate as the table holds it: the value of its variable, or, for Triton, the
    configuration that its launcher makes of it."""
    if field == "config":
        from papo_kernels.triton_impl import launch

        return dict(launch.parse(candidate))
    return {field: [int(number) for number in candidate.split(",")]}


def rows(result: dict[str, Any], source: dict[str, str]) -> dict[str, list[tuning.Row]]:
    """The new rows of each backend. A winner serves the columns down to half of what it was
    measured at, or to the next smaller number that was measured."""
    won = configurations(result)
    made: dict[str, list[tuning.Row]] = {}
    for (backend, dtype, columns, last), config in sorted(won.items(), key=lambda item: item[0]):
        below = [l for (b, d, _, l) in won if (b, d) == (backend, dtype) and l < columns]
        first = max([int(columns * REACH), *below]) + 1
        whole = {**({"tile": None, "stats": None} if backend == "cuda" else {}), **config}
        row = tuning.Row(result["device"], dtype, (first, last), whole, source)
        made.setdefault(backend, []).append(row)
    return made


def save(results: list[dict[str, Any]], source: dict[str, str], path: Path) -> dict[str, int]:
    """Writes the package's table with the winners in front, and says how many there are."""
    table = tuning.load()
    counts: dict[str, int] = {}
    for result in results:
        for backend, new in rows(result, {**source, "device": result["device"]}).items():
            counts[backend] = len(new)
            for row in reversed(new):
                table[backend] = tuning.insert(table[backend], row)
    if counts:
        tuning.save(table, path)
    return counts
