"""Parts 3, 4 and 6: tokens' effects, whose updates they are of, and their asymmetry."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from experiments.validity import statistics
from experiments.validity.summary.reading import KINDS, Row, column

SAMPLES = 1000  # of the batches: a token's table is long
SCORES = ("polarity", "sampled term", "STEER, signed", "covariance", "A·L")
SHARED = "shared polarity"
EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the bins of probability
Tokens = dict[str, Tensor]


def effects(tokens: Tokens, sizes: dict[str, float]) -> dict[str, Any]:
    """Part 3: every score against the token's true effect on the mean entropy of its batch.

    Args:
        tokens: of `reading.tokens`.
        sizes: of the steps, by kind: true effects become nats.
    """
    unit = tokens["unit"]
    counts = statistics.resamples(int(unit.max()) + 1, SAMPLES)
    found: dict[str, Any] = {"tokens": len(unit), "batches": counts.shape[1], "kinds": {}}
    for kind in KINDS:
        true = sizes[kind] * tokens[f"true {kind}"]
        scores = {name: tokens[name] for name in SCORES} | {SHARED: tokens[f"shared {kind}"]}
        correlation = functools.partial(statistics.correlation, counts=counts, unit=unit)
        found["kinds"][kind] = {
            "falling": float((true < 0.0).double().mean()),
            "scores": {
                name: {
                    **correlation(score, true),
                    "right signs": statistics.right_signs(score, true),
                    "deciles": statistics.by_decile(score, true),
                }
                for name, score in scores.items()
            },
            "own change": correlation(tokens["polarity"], tokens[f"measured {kind}"]),
        }
    return found


def asymmetry(tokens: Tokens, sizes: dict[str, float]) -> dict[str, Any]:
    """Part 6: means by probability and by the sign of the advantage.

    `predicted` is A c, `own <kind>` the measured change of the token's own entropy in nats, and
    `true <kind>` its effect on the mean entropy of its batch in nats.
    """
    unit, p = tokens["unit"], tokens["p"]
    counts = statistics.resamples(int(unit.max()) + 1, SAMPLES)
    quantities = {"predicted": tokens["advantage"] * tokens["unit_polarity"]}
    for kind in KINDS:
        quantities[f"own {kind}"] = tokens[f"measured {kind}"]
        quantities[f"true {kind}"] = sizes[kind] * tokens[f"true {kind}"]
    bins = torch.bucketize(p, torch.tensor(EDGES[1:-1], dtype=torch.float64))
    found: dict[str, Any] = {"edges": list(EDGES)}
    for sign in ("positive", "negative"):
        side = tokens["advantage"] > 0.0 if sign == "positive" else tokens["advantage"] < 0.0
        parts = [side & (bins == i) for i in range(len(EDGES) - 1)]
        found[sign] = {"tokens": [int(part.sum()) for part in parts]}
        for name, values in quantities.items():
            found[sign][name] = [
                statistics.mean(values[part], counts, unit[part]) if part.any() else None
                for part in parts
            ]
    return found


def whose(records: list[Row]) -> dict[str, Any]:
    """Part 4: what a token's own update, the others' and second order do to its entropy.

    `shares` are mean absolute parts over their sum.
    """
    found: dict[str, Any] = {}
    for kind in KINDS:
        of_kind = [row for row in records if row["kind"] == kind]
        if not of_kind:
            continue
        names = ("own", "total", "measured", "advantage", "unit_polarity")
        own, total, measured, advantage, unit_polarity = (column(of_kind, n) for n in names)
        parts = {"own": own, "others": total - own, "second order": measured - total}
        size = sum(float(part.abs().mean()) for part in parts.values())
        polarity = advantage * unit_polarity
        numbers = column(of_kind, "batch")
        unit = torch.unique(numbers, return_inverse=True)[1]
        counts = statistics.resamples(int(unit.max()) + 1)
        correlation = functools.partial(statistics.correlation, counts=counts, unit=unit)
        found[kind] = {
            "tokens": len(of_kind),
            "batches": counts.shape[1],
            "shares": {name: float(part.abs().mean()) / size for name, part in parts.items()},
            "mean": {name: float(part.mean()) for name, part in parts.items()},
            "polarity with own": correlation(polarity, own),
            "polarity with measured": correlation(polarity, measured),
            "own with measured": correlation(own, measured),
            "total with measured": correlation(total, measured),
        }
    return found
