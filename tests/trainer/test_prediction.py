"""Predicted entropy changes: what AdamW makes of polarity's, how they are kept, how they do."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from papo.config import OptimConfig
from papo.policy.batch import TrainingSequence
from papo.policy.prediction import (
    FEWEST,
    PREDICTIONS,
    WINDOW,
    EntropyPrediction,
    correlation_of,
    rank_correlation,
)
from papo.policy.update import TokenSums, Update
from papo.policy.weighting import BranchSums
from papo.record.metric_names import METRICS
from tests.trainer.bigram import VOCABULARY, Bigram, measured_update

FIRST, THROUGH, ALONE = PREDICTIONS
MEASURED = "entropy/measured_delta"


def optim(**options: Any) -> OptimConfig:
    return OptimConfig(**{"lr": 1e-2, "betas": (0.9, 0.99), "max_grad_norm": 1e9, **options})


def effect(
    instant: float,
    grad_norm: float = 2.0,
    lr: float = 0.1,
    measured: float | None = None,
    first_order: float = 0.5,
) -> Update:
    sums = TokenSums(*[0.0] * 10)._replace(predicted=instant)
    effects = {"first_order": first_order, "measured_delta": measured}
    return Update(sums, BranchSums(*[0.0] * 11), grad_norm, lr, **effects)


def random_effects(count: int, seed: int = 0) -> list[Update]:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 3, generator=g, dtype=torch.float64).tolist()
    return [effect(p, abs(p) + 0.1, 0.1, m, f) for p, m, f in rows]


def test_the_metrics_are_named_once() -> None:
    """And documented: what `observe` gives is in the table of names."""
    assert list(PREDICTIONS) == [
        f"entropy/predicted_delta{s}" for s in ("", "_polarity", "_instant")
    ]
    figures = EntropyPrediction(optim(), 4).observe(random_effects(1))
    assert list(figures) == [*PREDICTIONS, MEASURED, *map(correlation_of, PREDICTIONS)]
    assert set(figures) <= set(METRICS)


# ---- through AdamW ------------------------------------------------------------------------------


def test_the_first_update_is_the_rate_times_the_prediction_over_the_gradients_rms() -> None:
    """Bias correction at k = 1 gives back this gradient and its own norm."""
    options = optim(eps=1e-2)
    got = EntropyPrediction(options, 9).observe([effect(0.3, grad_norm=6.0, lr=0.5)])
    through = pytest.approx(0.5 * 0.3 / (6.0 / 3.0 + 1e-2))
    assert got == {FIRST: 0.5, THROUGH: through, ALONE: 0.3}


def test_the_momentum_of_a_constant_series_is_the_series() -> None:
    prediction = EntropyPrediction(optim(), 4)
    for _ in range(30):
        figures = prediction.observe([effect(-0.2, grad_norm=2.0)])
        assert figures[THROUGH] == pytest.approx(0.1 * -0.2 / 1.0, rel=1e-6)


@pytest.mark.parametrize("bound", [1e9, 1.5])
def test_what_adamw_does_to_the_gradient_the_prediction_goes_through(bound: float) -> None:
    """Where all parameters have one gradient, the prediction of a quantity that is their mean is
    what AdamW does to it: momentum, both bias corrections, clipping and epsilon, step for step.
    """
    options = optim(eps=1e-3, max_grad_norm=bound)
    weights = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    adamw = torch.optim.AdamW([weights], betas=options.betas, eps=options.eps, weight_decay=0.0)
    prediction = EntropyPrediction(options, 7)
    g = torch.Generator().manual_seed(1)
    clipped = 0
    for k in range(40):
        slope, lr = float(torch.randn((), generator=g)), 0.1 / (k + 1)
        before = weights.detach().mean()
        weights.grad = torch.full_like(weights, -slope)
        norm = float(torch.nn.utils.clip_grad_norm_([weights], bound))
        clipped += norm > bound
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        moved = float(weights.detach().mean() - before)
        figures = prediction.observe([effect(slope, norm, lr)])
        assert figures[THROUGH] == pytest.approx(moved, rel=1e-5, abs=1e-8)
    assert clipped == 0 if bound > 1e6 else 5 < clipped < 40


def test_a_steps_figures_are_sums_over_its_updates() -> None:
    together, alone = EntropyPrediction(optim(), 4), EntropyPrediction(optim(), 4)
    effects = random_effects(2)
    both = together.observe(effects)
    apart = [alone.observe([e]) for e in effects]
    for name in (*PREDICTIONS, MEASURED):
        assert both[name] == pytest.approx(sum(figures[name] for figures in apart))
    assert len(together.state_dict()["points"]) == 1  # steps are compared, not updates


def test_a_skipped_update_leaves_the_state_as_it_leaves_adamws() -> None:
    prediction = EntropyPrediction(optim(), 4)
    prediction.observe(random_effects(3))
    before = prediction.state_dict()
    figures = prediction.observe([replace(effect(0.5), reason="loss is nan")])
    assert prediction.state_dict() == before
    assert all(math.isnan(figures[name]) for name in (*PREDICTIONS, MEASURED))


def test_a_step_is_predicted_from_the_updates_that_were_applied() -> None:
    """A skipped one moves no weights, and its first order is NaN."""
    done, skipped = random_effects(1)[0], effect(0.5, first_order=math.nan)
    skipped = replace(skipped, reason="gradient norm is inf")
    figures = EntropyPrediction(optim(), 4).observe([skipped, done, skipped])
    assert figures == pytest.approx(EntropyPrediction(optim(), 4).observe([done]), nan_ok=True)
    assert figures[FIRST] == done.first_order


def test_a_prediction_that_is_no_number_spoils_no_later_one() -> None:
    prediction, other = EntropyPrediction(optim(), 4), EntropyPrediction(optim(), 4)
    figures = prediction.observe([effect(math.nan, measured=0.1)])
    other.observe([effect(0.0, measured=0.1)])
    assert math.isnan(figures[ALONE])
    assert prediction.state_dict()["points"] == [[0.5, 0.0, None, 0.1]]
    assert prediction.observe([effect(0.5)]) == other.observe([effect(0.5)])
    json.dumps(prediction.state_dict(), allow_nan=False)


# ---- the running correlation --------------------------------------------------------------------


def test_what_was_not_measured_has_neither_a_change_nor_a_correlation() -> None:
    prediction = EntropyPrediction(optim(), 4)
    for e in random_effects(FEWEST):
        figures = prediction.observe([e])
    assert all(-1.0 <= figures[correlation_of(name)] <= 1.0 for name in PREDICTIONS)
    assert set(prediction.observe([effect(0.5)])) == set(PREDICTIONS)
    assert len(prediction.state_dict()["points"]) == FEWEST


def test_correlations_are_of_the_last_steps_and_need_some() -> None:
    prediction, points = EntropyPrediction(optim(betas=(0.5, 0.9)), 4), []
    for k, e in enumerate(random_effects(WINDOW + 10), start=1):
        figures = prediction.observe([e])
        points.append([figures[name] for name in (*PREDICTIONS, MEASURED)])
        *columns, measured = zip(*points[-WINDOW:], strict=True)
        for name, column in zip(PREDICTIONS, columns, strict=True):
            correlation = figures[correlation_of(name)]
            if k < FEWEST:
                assert math.isnan(correlation)
            else:
                assert correlation == rank_correlation(column, measured)
    assert len({figures[correlation_of(name)] for name in PREDICTIONS}) == len(PREDICTIONS)


def test_without_an_average_gradient_polarity_is_compared_all_the_same() -> None:
    """`metrics.predict_share` 0, or a run that goes on with another value."""
    effects = [replace(e, first_order=math.nan) for e in random_effects(WINDOW)]
    prediction, other = EntropyPrediction(optim(), 4), EntropyPrediction(optim(), 4)
    for e, known in zip(effects, random_effects(WINDOW), strict=True):
        figures, expected = prediction.observe([e]), other.observe([known])
    for name in (FIRST, correlation_of(FIRST)):
        assert math.isnan(figures.pop(name)) and math.isfinite(expected.pop(name))
    assert figures == expected
    json.dumps(prediction.state_dict(), allow_nan=False)
    for e in random_effects(FEWEST):
        figures = prediction.observe([e])
    last = random_effects(FEWEST)
    expected = rank_correlation([e.first_order for e in last], [e.measured_delta for e in last])
    assert figures[correlation_of(FIRST)] == expected


def test_a_resumed_prediction_is_unbroken_bit_for_bit() -> None:
    effects = random_effects(WINDOW + 20)
    effects[30] = replace(effects[30], first_order=math.nan)
    unbroken = EntropyPrediction(optim(), 4)
    expected = [unbroken.observe([e]) for e in effects]
    first, second = EntropyPrediction(optim(), 4), EntropyPrediction(optim(), 4)
    got = [first.observe([e]) for e in effects[:60]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    got += [second.observe([e]) for e in effects[60:]]
    assert got[60:] == expected[60:]
    assert second.state_dict() == unbroken.state_dict()


TIED = [1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 7.0, -4.0, 2.0]


@pytest.mark.parametrize(
    ("b", "expected"),
    [
        ([x**3 for x in TIED], 1.0),
        ([-math.exp(x) for x in TIED], -1.0),
        # scipy.stats.spearmanr of the same numbers
        ([5.0, 1.0, 1.0, 4.0, 9.0, 9.0, 2.0, 0.0, 5.0], 0.436785348634133),
        ([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0], -0.191369475175786),
    ],
)
def test_rank_correlation_with_ties_is_spearmans(b: list[float], expected: float) -> None:
    assert rank_correlation(TIED, b) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(b, TIED) == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_leaves_out_what_is_not_finite() -> None:
    a, b = [*TIED, math.nan, 5.0, math.inf], [*map(float, range(9)), 1.0, math.nan, 2.0]
    assert rank_correlation(a, b) == rank_correlation(TIED, b[:9])
    assert math.isnan(rank_correlation(TIED[: FEWEST - 1], b[: FEWEST - 1]))
    assert math.isnan(rank_correlation([1.0] * 9, b[:9]))
    assert math.isnan(rank_correlation([], []))


# ---- a policy under AdamW -----------------------------------------------------------------------


def completions(seed: int) -> list[TrainingSequence]:
    """Eight of eight tokens, each weighing one 64th."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (8, 9), generator=g).tolist()
    advantages = torch.randn(8, generator=g).tolist()
    return [
        TrainingSequence((i[0],), tuple(i[1:]), (-1.0,) * 8, a, 1 / 64, n)
        for n, (i, a) in enumerate(zip(ids, advantages, strict=True))
    ]


def test_the_weights_move_by_the_momentum_and_so_does_the_prediction() -> None:
    """Advantages whose sign alternates, and drifts: gradients point to and fro, what moves the
    policy is their average. The prediction of this step's gradient alone says less of the entropy
    change that follows than the same number passed through AdamW.
    """
    options = optim(eps=1e-4)
    start = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))
    engine = Bigram(options, start)
    prediction = EntropyPrediction(options, start.numel())
    for k in range(48):
        sign = (-1.0) ** k + 0.3 * math.sin(k / 3)
        part = [replace(s, advantage=sign * s.advantage) for s in completions(k)]
        done, measurement = measured_update(engine, part, lr=1e-3)
        figures = prediction.observe([measurement.measure(done)])
    assert figures[correlation_of(THROUGH)] > 0.85
    assert figures[correlation_of(ALONE)] < 0.7
