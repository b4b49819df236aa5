"""Part 5: what whole runs predicted of their steps."""

from __future__ import annotations

import statistics as averages
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.validity import statistics
from experiments.validity.runs import CONFIGS
from experiments.validity.summary.reading import Row, rounded
from papo.policy.prediction import FEWEST, rank_correlation
from papo.record.jsonl import read_rows

MEASURED = "entropy/measured_delta"
PREDICTIONS = {
    "first order": "entropy/predicted_delta",
    "polarity through AdamW": "entropy/predicted_delta_polarity",
    "polarity, gradient alone": "entropy/predicted_delta_instant",
}
SERIES = {
    "levels": lambda values: values,
    "differences": torch.diff,
    "detrended": statistics.detrended,
}


def summarized(folder: Path) -> dict[str, Any]:
    """Figures of every method's runs, `<method>-<seed>` in `folder`, and their series."""
    found = {}
    for method in CONFIGS:
        seeds = {}
        for path in sorted(folder.glob(f"{method}-*/metrics.jsonl")):
            steps = [row for row in read_rows(path) if _usable(row)]
            if len(steps) > FEWEST:
                seeds[path.parent.name.removeprefix(f"{method}-")] = steps
        if seeds:
            found[method] = _method(seeds)
    return found


def _usable(row: Row) -> bool:
    """Of a step that was measured, and predicted in all ways."""
    return all(row.get(name) is not None for name in (MEASURED, *PREDICTIONS.values()))


def _values(steps: list[Row], name: str) -> Tensor:
    return torch.tensor([row[name] for row in steps], dtype=torch.float64)


def _method(seeds: dict[str, list[Row]]) -> dict[str, Any]:
    measured = {seed: _values(steps, MEASURED) for seed, steps in seeds.items()}
    predictions = {}
    for label, name in PREDICTIONS.items():
        predicted = {seed: _values(steps, name) for seed, steps in seeds.items()}
        pairs = [(predicted[seed], measured[seed]) for seed in seeds]
        predictions[label] = {
            **{series: _correlation(pairs, series) for series in SERIES},
            "right signs": averages.mean(statistics.right_signs(*pair) for pair in pairs),
        }
    return {
        "predictions": predictions,
        "steps": [len(steps) for steps in seeds.values()],
        "time": averages.median(
            row["time/stats"] / row["time/step"] for steps in seeds.values() for row in steps
        ),
        "series": rounded({seed: _series(steps) for seed, steps in seeds.items()}, 4),
    }


def _correlation(pairs: list[tuple[Tensor, Tensor]], series: str) -> dict[str, Any]:
    """Mean over the runs of Spearman's correlation; blocks of steps are drawn in each run."""
    of = SERIES[series]
    values, sampled = [], []
    for i, (predicted, measured) in enumerate(pairs):
        a, b = of(predicted), of(measured)
        values.append(rank_correlation(a.tolist(), b.tolist()))
        counts = statistics.block_resamples(len(a), seed=i)
        sampled.append(statistics.rank_correlations(a, b, counts))
    return {
        "value": averages.mean(values),
        "runs": values,
        "interval": statistics.interval(torch.stack(sampled).mean(0)),
    }


def _series(steps: list[Row]) -> dict[str, list[float]]:
    names = {"measured": MEASURED, **PREDICTIONS}
    found = {label: [row[name] for row in steps] for label, name in names.items()}
    return {"step": [row["step"] for row in steps], **found}
