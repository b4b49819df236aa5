"""The raw records: rows of JSON, and the tokens' tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.validity.records import Row
from experiments.validity.scores import token_scores
from papo_kernels import TokenStats

TASKS = ("chain_sum", "mawps")
KINDS = ("sgd", "adam")  # of the steps whose tokens are looked at


def column(records: list[Row], *keys: str) -> Tensor:
    """What stands under `keys` in every row; float64 [rows]."""
    values = []
    for row in records:
        value: Any = row
        for key in keys:
            value = value[key]
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def tokens(folder: Path) -> dict[str, Tensor]:
    """The tokens of a task's batches, those with a nonzero advantage; float64 [n] each.

    Beside what is stored: `unit`, the int64 number of the batch among those that are there, `p`,
    and each of `token_scores` times the token's weight, of which the covariance's means are its
    batch's. Empty where there is no batch.
    """
    paths = sorted(folder.glob("*.pt"), key=lambda path: int(path.stem))
    found = [_batch(path, i) for i, path in enumerate(paths)]
    if not found:
        return {}
    joined = {name: torch.cat([batch[name] for batch in found]) for name in found[0]}
    live = joined["advantage"] != 0.0
    return {name: values[live] for name, values in joined.items()}


def _batch(path: Path, number: int) -> dict[str, Tensor]:
    stored = torch.load(path, weights_only=True)
    batch: dict[str, Tensor] = {name: values.double() for name, values in stored.items()}
    stats = TokenStats(*(batch.get(name, torch.tensor(math.nan)) for name in TokenStats._fields))
    scores = token_scores(stats, batch["advantage"])
    weighted = {name: batch["weight"] * score for name, score in scores.items()}
    unit = torch.full((len(batch["logp"]),), number)
    return {**batch, **weighted, "p": batch["logp"].exp(), "unit": unit}


def main_size(sizes: list[str]) -> str:
    """The middle one of the keys of step sizes, the lower of two."""
    ordered = sorted(sizes, key=float)
    return ordered[(len(ordered) - 1) // 2]


def rounded(value: Any, digits: int = 5) -> Any:
    """`value` with its numbers cut to so many digits; what is not finite becomes None."""
    if isinstance(value, dict):
        return {key: rounded(x, digits) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(x, digits) for x in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
