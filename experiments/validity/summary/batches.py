"""Part 2: the batches' steps, each predictor against the measured change."""

from __future__ import annotations

import statistics as averages
from typing import Any

import torch
from torch import Tensor

from experiments.validity import statistics
from experiments.validity.summary.reading import Row, column, main_size, rounded

CALIBRATED = "calibrated"
CALIBRATING = ("polarity", "A·L", "covariance")  # their sums by sign of the advantage
OVER_LENGTH = "polarity over step length"
# Pairs of predictors whose correlations are compared.
COMPARED = (
    ("polarity", "sampled term"),
    ("polarity", "covariance"),
    ("polarity", "A·L"),
    ("averaged", "covariance"),
    ("averaged", "A·L"),
    ("averaged", "own"),
)
SHOWN = ("polarity", "averaged")  # whose points are drawn


def summarized(records: list[Row]) -> dict[str, Any]:
    """A task's figures."""
    kinds = {kind: _sizes(records, kind) for kind in records[0]["measured"]}
    return {
        "batches": len(records),
        "tokens": averages.median(row["tokens"] for row in records),
        "reward": averages.mean(row["reward"] for row in records),
        "kinds": {kind: _kind(records, kind, main_size(sizes)) for kind, sizes in kinds.items()},
        "sizes": {
            kind: {size: _size(records, kind, size) for size in sizes}
            for kind, sizes in kinds.items()
        },
        "cosine": {
            name: _spread([row["cosine"][name] for row in records]) for name in records[0]["cosine"]
        },
        "seconds": {
            name: averages.median(row["seconds"][name] for row in records)
            for name in records[0]["seconds"]
        },
    }


def _sizes(records: list[Row], kind: str) -> list[str]:
    found = {size for row in records for size in row["measured"].get(kind, {})}
    return sorted(found, key=float)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": averages.median(values), "low": min(values), "high": max(values)}


def _predictions(records: list[Row], kind: str, size: str) -> dict[str, Tensor]:
    """Every predictor's, float64 [batches]: scores as they are, first order in nats."""
    scores = {name: column(records, "scores", name) for name in records[0]["scores"]}
    sums = torch.cat([scores[name] for name in CALIBRATING], 1)
    measured = column(records, "measured", kind, size)
    return {
        **{name: parts.sum(1) for name, parts in scores.items()},
        OVER_LENGTH: column(records, OVER_LENGTH),
        CALIBRATED: statistics.left_out(sums, measured),
        **{
            name: float(size) * column(records, "first_order", kind, name)
            for name in records[0]["first_order"][kind]
        },
    }


def _measured_at(records: list[Row], kind: str, size: str) -> list[Row]:
    return [row for row in records if size in row["measured"].get(kind, {})]


def _kind(records: list[Row], kind: str, size: str) -> dict[str, Any]:
    """A kind of step at its main size."""
    records = _measured_at(records, kind, size)
    measured = column(records, "measured", kind, size)
    predictions = _predictions(records, kind, size)
    counts = statistics.resamples(len(records))
    return {
        "size": float(size),
        "batches": len(records),
        "measured": _spread(measured.tolist()),
        "falling": float((measured < 0.0).double().mean()),
        "predictors": {
            name: {
                **statistics.correlation(predicted, measured, counts),
                "right signs": statistics.right_signs(predicted, measured),
            }
            for name, predicted in predictions.items()
        },
        "differences": {
            f"{name} - {other}": statistics.difference(
                predictions[name], predictions[other], measured, counts
            )
            for name, other in COMPARED
            if name in predictions and other in predictions
        },
        "points": rounded(
            {
                "measured": measured.tolist(),
                **{name: predictions[name].tolist() for name in SHOWN},
            },
            4,
        ),
    }


def _size(records: list[Row], kind: str, size: str) -> dict[str, Any]:
    """A size of step: the ranks, and what first order leaves.

    `second order` is the part of the measured change that first order with the batch's own
    gradient does not give, over the change: a median over batches.
    """
    several = [row for row in records if len(row["measured"].get(kind, {})) > 1]
    records = _measured_at(several or records, kind, size)
    measured = column(records, "measured", kind, size)
    predictions = _predictions(records, kind, size)
    counts = statistics.resamples(len(records))
    rest = (measured - predictions["own"]).abs() / measured.abs()
    return {
        "batches": len(records),
        "measured": float(measured.abs().median()),
        "second order": float(rest.median()),
        **{
            name: statistics.correlation(predictions[name], measured, counts)
            for name in ("polarity", "own", "averaged")
        },
    }
