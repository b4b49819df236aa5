"""Part 1: a table of softmaxes, where first order is all there is to polarity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papo_kernels import token_stats

ROWS, COLUMNS, SAMPLES = 64, 50, 4
SIZES = tuple(10.0**-k for k in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0))


def mean_entropy(table: Tensor) -> Tensor:
    """Of the rows, in nats."""
    logp = table.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean()


def figures() -> dict[str, Any]:
    """Predicted over actual change, and what first order leaves, by the size of the step."""
    g = torch.Generator().manual_seed(1)
    table = 2.0 * torch.randn(ROWS, COLUMNS, generator=g, dtype=torch.float64)
    p = table.softmax(-1)
    tokens = torch.multinomial(p, SAMPLES, replacement=True, generator=g)
    advantages = torch.randn(ROWS, SAMPLES, generator=g, dtype=torch.float64)
    onto = torch.nn.functional.one_hot(tokens, COLUMNS) - p[:, None]
    direction = (advantages[..., None] * onto).sum(1)
    unit = torch.stack([token_stats(table, tokens[:, k]).unit_polarity for k in range(SAMPLES)], 1)
    predicted = float((advantages * unit).sum() / ROWS)
    before = float(mean_entropy(table))
    actual = [float(mean_entropy(table + size * direction)) - before for size in SIZES]
    remainder = [abs(a - size * predicted) for a, size in zip(actual, SIZES, strict=True)]
    pairs = list(zip(SIZES, remainder, strict=True))[-4:]
    x, y = (torch.tensor([math.log(v) for v in side]) for side in zip(*pairs, strict=True))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return {
        "sizes": list(SIZES),
        "ratio": [size * predicted / a for a, size in zip(actual, SIZES, strict=True)],
        "remainder": remainder,
        "slope": float(slope),
    }


def main(folder: Path) -> None:
    """Write `tabular.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tabular.json").write_text(json.dumps(figures()))
