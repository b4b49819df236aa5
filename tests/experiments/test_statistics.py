"""Rank correlations, their intervals, and what is made of series and of tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from experiments.validity import statistics
from papo.policy.prediction import rank_correlation


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct", "ties"])
def test_a_sample_is_correlated_as_if_its_elements_were_there_that_often(step: float) -> None:
    a, b = normal(2, 20)
    if step:
        a, b = (a / step).round(), (b / step).round()
    counts = statistics.resamples(20, 30)
    found = statistics.rank_correlations(a, b, counts)
    for row, value in zip(counts, found, strict=True):
        repeated = row.long()
        one, other = (x.repeat_interleave(repeated).tolist() for x in (a, b))
        assert float(value) == pytest.approx(rank_correlation(one, other), abs=1e-12)


def test_the_extremes_and_a_constant() -> None:
    a = torch.arange(10, dtype=torch.float64)
    counts = statistics.resamples(10, 50)
    assert statistics.rank_correlations(a, a.exp(), counts) == pytest.approx(1.0)
    assert statistics.rank_correlations(a, -a, counts) == pytest.approx(-1.0)
    assert statistics.rank_correlations(a, torch.ones(10).double(), counts).isnan().all()


def test_a_sample_draws_as_many_as_there_are() -> None:
    for counts in (statistics.resamples(37, 200), statistics.block_resamples(37, 5, 200)):
        assert counts.shape == (200, 37)
        assert counts.sum(1).eq(37).all()
    assert statistics.block_resamples(6, 6, 20).eq(1).all(), "one block is the series itself"
    assert statistics.block_resamples(4, 9, 20).eq(1).all(), "a block longer than the series"
    assert not statistics.block_resamples(37).equal(statistics.block_resamples(37, seed=1))


def test_blocks_hold_neighbors() -> None:
    """Of blocks of 5, at most one is cut: any sample has at least 4 of 5 units with a neighbor."""
    drawn = statistics.block_resamples(50, 5, 300) > 0
    beside = torch.zeros_like(drawn)
    beside[:, 1:] |= drawn[:, :-1]
    beside[:, :-1] |= drawn[:, 1:]
    assert (drawn & ~beside).sum(1).le(1).all()


def test_intervals_cover_the_true_correlation() -> None:
    """Spearman's of two normal variables is 6/pi asin(r/2). 300 data sets of 60: 95% less a little,
    because percentiles of 60 are narrow (2.5 standard errors of 0.0126)."""
    r, sets = 0.6, 300
    true = 6.0 / math.pi * math.asin(r / 2.0)
    x, e = normal(2, sets, 60, seed=7)
    y = r * x + math.sqrt(1.0 - r * r) * e
    counts = statistics.resamples(60, 400)
    ends = [statistics.correlation(a, b, counts)["interval"] for a, b in zip(x, y, strict=True)]
    covered = sum(low <= true <= high for low, high in ends) / sets
    assert 0.90 <= covered <= 0.98


def test_blocks_widen_the_interval_of_a_slow_series() -> None:
    noise = normal(2, 200, seed=3)
    slow = torch.stack([noise[:, :1].clone().squeeze(1)] * 200, 1)
    for i in range(1, 200):
        slow[:, i] = 0.95 * slow[:, i - 1] + noise[:, i]
    a, b = slow
    single = statistics.correlation(a, b, statistics.resamples(200, 1000))["interval"]
    blocks = statistics.correlation(a, b, statistics.block_resamples(200, 20, 1000))["interval"]
    assert blocks[1] - blocks[0] > 1.5 * (single[1] - single[0])


def test_elements_are_drawn_with_their_unit() -> None:
    """Copies of a batch's tokens tell nothing new: the interval is that of the batches."""
    a, b = normal(2, 30, seed=1)
    counts = statistics.resamples(30, 200)
    unit = torch.arange(30).repeat_interleave(4)
    alone = statistics.correlation(a, b, counts)
    copied = statistics.correlation(a[unit], b[unit], counts, unit)
    assert copied["interval"] == pytest.approx(alone["interval"], abs=1e-9)
    assert copied["value"] == pytest.approx(alone["value"], abs=1e-9)


def test_a_long_table_is_sampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(2, 40, seed=2)
    counts = statistics.resamples(40, 100)
    whole = statistics.sampled_correlations(a, b, counts)
    monkeypatch.setattr(statistics, "_AT_ONCE", 7 * 40)
    assert statistics.sampled_correlations(a, b, counts).equal(whole)


def test_a_difference_is_taken_in_the_same_samples() -> None:
    """Of two predictors that share their noise it is much narrower than their intervals."""
    truth, noise, own = normal(3, 80, seed=4)
    good, better = truth + noise + 0.1 * own, truth + 0.9 * noise
    counts = statistics.resamples(80, 500)
    found = statistics.difference(better, good, truth, counts)
    each = [statistics.correlation(x, truth, counts) for x in (better, good)]
    assert found["value"] == pytest.approx(each[0]["value"] - each[1]["value"])
    wide = each[1]["interval"][1] - each[1]["interval"][0]
    assert found["interval"][1] - found["interval"][0] < 0.5 * wide
    assert statistics.difference(good, good, truth, counts)["interval"] == [0.0, 0.0]


def test_means_are_over_elements() -> None:
    values = torch.tensor([1.0, 1.0, 4.0]).double()
    unit = torch.tensor([0, 0, 1])
    counts = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]]).double()
    found = statistics.mean(values, counts, unit)
    assert found["value"] == 2.0
    assert found["interval"] == pytest.approx([1.05, 3.9])  # of 2, 1 and 4


def test_right_signs_count_what_has_a_sign() -> None:
    predicted = torch.tensor([1.0, -1.0, 2.0, 0.0, 3.0])
    actual = torch.tensor([2.0, -3.0, -1.0, 1.0, 0.0])
    assert statistics.right_signs(predicted, actual) == pytest.approx(2 / 3)
    assert math.isnan(statistics.right_signs(predicted[3:], actual[3:]))


def test_a_quadratic_trend_is_taken_out_and_no_more() -> None:
    t = torch.arange(40, dtype=torch.float64)
    wiggle = (-1.0) ** t
    found = statistics.detrended(3.0 - 0.5 * t + 0.01 * t * t + wiggle)
    assert torch.allclose(found, statistics.detrended(wiggle), atol=1e-9)
    assert torch.allclose(found, wiggle, atol=0.1)
    assert statistics.detrended(0.2 * t * t).abs().max() < 1e-9


def test_a_value_is_predicted_from_all_others() -> None:
    features, noise = normal(25, 3, seed=5), normal(25, seed=6)
    values = 1e-6 * (features @ torch.tensor([1.0, -2.0, 0.5]).double() + noise)
    found = statistics.left_out(features * torch.tensor([1.0, 1e-4, 1e3]).double(), values)
    for i in range(25):
        rest = [j for j in range(25) if j != i]
        fit = torch.linalg.lstsq(features[rest], values[rest][:, None]).solution
        assert float(found[i]) == pytest.approx(float(features[i] @ fit), rel=1e-6)


def test_deciles_are_of_the_score() -> None:
    score = torch.tensor([3.0, 1.0, 2.0, 0.0]).double()
    effect = torch.tensor([30.0, 10.0, 20.0, 0.0]).double()
    assert statistics.by_decile(score, effect, 2) == [5.0, 25.0]
