"""Group-relative advantages, length penalty and token weights against brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papo.advantage import group_advantages, overlong_penalty, sequence_token_weights

rewards = st.lists(st.sampled_from([0.0, 0.25, 1.0, math.nan]), min_size=4, max_size=4)


@given(st.lists(rewards, min_size=1, max_size=5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_group_advantages_match_the_definition(rows: list[list[float]], normalize: bool) -> None:
    got = group_advantages(torch.tensor(rows), normalize_std=normalize)
    for g, row in enumerate(rows):
        kept = [r for r in row if not math.isnan(r)]
        spread = len(kept) >= 2 and max(kept) - min(kept) > 1e-6
        assert bool(got.zero_spread[g]) is not spread
        mean = sum(kept) / len(kept) if kept else 0.0
        std = math.sqrt(sum((r - mean) ** 2 for r in kept) / (len(kept) - 1)) if len(kept) > 1 else 0.0
        for i, r in enumerate(row):
            expected = 0.0 if math.isnan(r) or not spread else (r - mean) / (std + 1e-6 if normalize else 1.0)
            assert got.advantages[g, i].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)
            assert bool(got.valid[g, i]) is not math.isnan(r)


def test_requirement_10_equal_rewards_have_zero_spread_whatever_float_std_says() -> None:
    row = torch.full((1, 7), 0.1)
    assert row.double().std().item() == 0.0 or row.std().item() < 1e-6
    got = group_advantages(row, normalize_std=True)
    assert got.zero_spread.all() and (got.advantages == 0).all()


def test_requirement_12_nan_reward_masks_its_row_only() -> None:
    with_nan = group_advantages(torch.tensor([[1.0, 0.0, math.nan, 0.0]]), normalize_std=True)
    without = group_advantages(torch.tensor([[1.0, 0.0, 0.0]]), normalize_std=True)
    assert torch.equal(with_nan.advantages[0, [0, 1, 3]], without.advantages[0])
    assert with_nan.advantages[0, 2] == 0 and not with_nan.valid[0, 2]


def test_requirement_13_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards: expected \[G, n\] with n >= 2, got \(3, 1\)"):
        group_advantages(torch.zeros(3, 1), normalize_std=True)


def test_infinite_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="rewards: expected finite"):
        group_advantages(torch.tensor([[1.0, math.inf]]), normalize_std=False)


def test_overlong_penalty_is_dapos() -> None:
    lengths = torch.tensor([10, 80, 90, 100, 120])
    assert overlong_penalty(lengths, 100, 20).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="buffer: expected 1 to 100"):
        overlong_penalty(lengths, 100, 0)


LENGTHS = [3, 1, 7, 5]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token", lambda n, k, t: 1 / t),
        ("sequence", lambda n, k, t: 1 / (k * n)),
        ("constant", lambda n, k, t: 1 / (k * 16)),
    ],
)
def test_token_weights_do_not_depend_on_the_split(aggregation: str, expected) -> None:
    mask = torch.tensor([True, True, False, True])
    kept = [n for n, m in zip(LENGTHS, mask.tolist(), strict=True) if m]
    options = {
        "aggregation": aggregation,
        "constant_length": 16,
        "global_tokens": float(sum(kept)),
        "global_sequences": float(len(kept)),
    }
    whole = sequence_token_weights(torch.tensor(LENGTHS), mask, **options)
    parts = [sequence_token_weights(torch.tensor(LENGTHS[i : i + 1]), mask[i : i + 1], **options) for i in range(4)]
    assert torch.equal(whole, torch.cat(parts))
    for n, m, w in zip(LENGTHS, mask.tolist(), whole.tolist(), strict=True):
        assert w == pytest.approx(expected(n, len(kept), sum(kept)) if m else 0.0)


def test_requirement_14_nothing_left_weighs_nothing() -> None:
    weights = sequence_token_weights(
        torch.tensor([4, 2]),
        torch.tensor([False, False]),
        aggregation="token",
        constant_length=None,
        global_tokens=0.0,
        global_sequences=0.0,
    )
    assert weights.tolist() == [0.0, 0.0]


def test_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="aggregation: expected token, sequence or constant, got 'mean'"):
        sequence_token_weights(
            torch.ones(1),
            torch.tensor([True]),
            aggregation="mean",
            constant_length=None,
            global_tokens=1.0,
            global_sequences=1.0,
        )
