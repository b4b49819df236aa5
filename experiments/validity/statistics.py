"""Rank correlations with bootstrap intervals, and what the study makes of series and of tokens.

A bootstrap sample is a row of counts, how often each unit (a batch, a step) was drawn: ranks of a
sample follow from the counts and the order of the units, which is found once. The samples depend
on the number of units alone, so that correlations over the same units are compared on the same
samples.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from papo.policy.prediction import rank_correlation

SAMPLES = 10_000
BLOCK = 5  # steps that are drawn together
_AT_ONCE = 2**22  # numbers of a table of samples x elements
Estimate = dict[str, Any]


def resamples(units: int, samples: int | None = None) -> Tensor:
    """Counts of `units` drawn with replacement; float64 [samples, units], `SAMPLES` by default."""
    return _drawn(units, 1, samples or SAMPLES, 0)


def block_resamples(
    units: int, block: int = BLOCK, samples: int | None = None, seed: int = 0
) -> Tensor:
    """Counts of a moving-block bootstrap: blocks of units that follow each other are drawn until
    there are `units`, the last block cut short; float64 [samples, units]."""
    return _drawn(units, min(block, units), samples or SAMPLES, seed)


@functools.lru_cache(maxsize=8)
def _drawn(units: int, block: int, samples: int, seed: int) -> Tensor:
    blocks = -(-units // block)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(units - block + 1, (samples, blocks), generator=generator)
    drawn = (starts[..., None] + torch.arange(block)).flatten(1)[:, :units]
    counts = torch.zeros(samples, units, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def rank_correlations(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """Spearman's correlation in every sample; equal values share the mean of their ranks.

    Args:
        a, b: float64 [n], finite.
        counts: float64 [samples, n].

    Returns:
        float64 [samples]; NaN where one side is constant in a sample.
    """
    ranks = [_ranks(values, counts) for values in (a, b)]
    total = counts.sum(1, keepdim=True)
    a, b = (r - (counts * r).sum(1, keepdim=True) / total for r in ranks)
    scale = ((counts * a * a).sum(1) * (counts * b * b).sum(1)).sqrt()
    return torch.where(scale > 0.0, (counts * a * b).sum(1) / scale, math.nan)


def _ranks(values: Tensor, counts: Tensor) -> Tensor:
    """Mean rank of each element among a sample's; [samples, n]."""
    distinct, which = torch.unique(values, return_inverse=True)
    if len(distinct) == len(values):
        drawn = counts[:, which.argsort()]
    else:
        drawn = torch.zeros(len(counts), len(distinct), dtype=torch.float64)
        drawn.index_add_(1, which, counts)
    return (drawn.cumsum(1) - (drawn - 1.0) / 2.0)[:, which]


def sampled_correlations(
    a: Tensor, b: Tensor, counts: Tensor, unit: Tensor | None = None
) -> Tensor:
    """`rank_correlations` of elements that are drawn with their unit.

    Args:
        a, b: float64 [n], finite.
        counts: float64 [samples, units].
        unit: int64 [n], the unit of each element; None where every element is its own.
    """
    rows = max(1, _AT_ONCE // len(a))
    return torch.cat(
        [
            rank_correlations(a, b, part if unit is None else part[:, unit])
            for part in counts.split(rows)
        ]
    )


def interval(sampled: Tensor) -> list[float]:
    """The 2.5 and 97.5 percentiles; samples without a value are left out."""
    ends: list[float] = sampled.nanquantile(sampled.new_tensor([0.025, 0.975])).tolist()
    return ends


def correlation(a: Tensor, b: Tensor, counts: Tensor, unit: Tensor | None = None) -> Estimate:
    """Spearman's correlation of all elements and its interval; arguments as in
    `sampled_correlations`."""
    return {
        "value": rank_correlation(a.tolist(), b.tolist()),
        "interval": interval(sampled_correlations(a, b, counts, unit)),
    }


def difference(a: Tensor, other: Tensor, b: Tensor, counts: Tensor) -> Estimate:
    """How much better `a` is correlated with `b` than `other` is, in the same samples."""
    target = b.tolist()
    value = rank_correlation(a.tolist(), target) - rank_correlation(other.tolist(), target)
    sampled = rank_correlations(a, b, counts) - rank_correlations(other, b, counts)
    return {"value": value, "interval": interval(sampled)}


def mean(values: Tensor, counts: Tensor, unit: Tensor) -> Estimate:
    """Mean of elements that are drawn with their unit, and its interval."""
    units = counts.shape[1]
    empty = torch.zeros(units, dtype=torch.float64)
    sums = empty.index_add(0, unit, values)
    sizes = empty.index_add(0, unit, torch.ones_like(values))
    drawn = counts @ sizes
    sampled = torch.where(drawn > 0.0, counts @ sums / drawn, math.nan)
    return {"value": float(values.mean()), "interval": interval(sampled)}


def right_signs(predicted: Tensor, actual: Tensor) -> float:
    """Share of elements whose signs agree, of those where both are nonzero; NaN of none."""
    both = (predicted != 0.0) & (actual != 0.0)
    agree = predicted[both].sign() == actual[both].sign()
    return float(agree.double().mean())


def detrended(values: Tensor, degree: int = 2) -> Tensor:
    """What a polynomial in the index leaves of a series; float64 [n]."""
    at = torch.linspace(-1.0, 1.0, len(values), dtype=torch.float64)
    powers = at[:, None] ** torch.arange(degree + 1)
    fitted = powers @ torch.linalg.lstsq(powers, values[:, None], driver="gelsd").solution
    return values - fitted[:, 0]


def left_out(features: Tensor, values: Tensor) -> Tensor:
    """Least-squares prediction of each value from a fit to all others, without a constant.

    Args:
        features: float64 [n, k].
        values: float64 [n].
    """
    scaled = features / features.norm(dim=0).clamp_min(1e-300)
    hat = scaled @ torch.linalg.pinv(scaled)
    residual = values - hat @ values
    return values - residual / (1.0 - hat.diagonal())


def by_decile(score: Tensor, effect: Tensor, parts: int = 10) -> list[float]:
    """Mean effect of the elements with the lowest scores, of the next, and so on; parts of equal
    size."""
    return [float(part.mean()) for part in effect[score.argsort(stable=True)].tensor_split(parts)]
