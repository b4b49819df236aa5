"""The raw records as one JSON: all that the tables and the images of docs/evidence.md show."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from benchmarks.harness import host_environment, save_json
from experiments.validity.records import rows as read
from experiments.validity.summary import batches, by_token, reading, whole_runs
from papo.errors import PapoError
from papo.policy.prediction import FEWEST

RESULTS = Path(__file__).parents[2] / "results"
LARGEST = 400_000  # bytes


def summarized(records: Path) -> dict[str, Any]:
    """The study's figures, of the parts whose records are in a folder.

    Raises:
        PapoError: no task has batches there, or one has too few.
    """
    found: dict[str, Any] = {
        part: {} for part in ("isolated", "tokens", "asymmetry", "own", "tabular")
    }
    for task in reading.TASKS:
        path = records / f"isolated-{task}.jsonl"
        rows = read(path)
        if not rows:
            continue
        if len(rows) < FEWEST:
            raise PapoError(f"{path}: {len(rows)} batches; expected at least {FEWEST}")
        found["isolated"][task] = batches.summarized(rows)
        kinds = found["isolated"][task]["kinds"]
        sizes = {kind: kinds[kind]["size"] for kind in reading.KINDS}
        if tokens := reading.tokens(records / f"tokens-{task}"):
            found["tokens"][task] = by_token.effects(tokens, sizes)
            found["asymmetry"][task] = by_token.asymmetry(tokens, sizes)
        if own := read(records / f"own-{task}.jsonl"):
            found["own"][task] = by_token.whose(own)
    if not found["isolated"]:
        raise PapoError(f"records={str(records)!r}: no batches there; expected isolated-*.jsonl")
    tabular = records / "tabular.json"
    if tabular.exists():
        found["tabular"] = json.loads(tabular.read_text())
    return reading.rounded({**found, "runs": whole_runs.summarized(records / "runs")})


def main(records: Path, results: Path = RESULTS) -> Path:
    """Write ``results/validity-DATE.json``.

    Raises:
        PapoError: no records, or more than a repository should hold.
    """
    date = datetime.date.today().isoformat()
    path = results / f"validity-{date}.json"
    summary = {"date": date, "environment": host_environment(), **summarized(records)}
    size = len(json.dumps(summary, indent=1))
    if size > LARGEST:
        raise PapoError(f"{path}: {size} bytes; expected at most {LARGEST}")
    results.mkdir(parents=True, exist_ok=True)
    return save_json(path, summary)
