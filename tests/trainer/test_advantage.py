"""Advantages against float64 by hand and their properties."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papo.policy.advantage import STD_EPS, group_advantages, overlong_penalty

NAN = math.nan


def by_hand(group, normalize_std):
    """The definition, one group at a time, with the standard library."""
    valid = [r for r in group if not math.isnan(r)]
    if len(valid) < 2 or max(valid) - min(valid) <= 1e-6:
        return [0.0] * len(group)
    mean = statistics.fmean(valid)
    spread = statistics.stdev(valid) + STD_EPS if normalize_std else 1.0
    return [0.0 if math.isnan(r) else (r - mean) / spread for r in group]


rewards_of_groups = st.integers(2, 6).flatmap(
    lambda n: st.lists(
        st.lists(
            st.one_of(st.floats(-4, 4, width=32), st.sampled_from([0.0, 1.0, NAN])),
            min_size=n,
            max_size=n,
        ),
        min_size=1,
        max_size=4,
    )
)


@settings(deadline=None)
@given(rewards_of_groups, st.booleans())
def test_advantages_are_the_definition(groups, normalize_std):
    out = group_advantages(torch.tensor(groups), normalize_std=normalize_std)
    expected = torch.tensor([by_hand(g, normalize_std) for g in groups])
    torch.testing.assert_close(out.advantages, expected, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(out.advantages).all()
    assert torch.equal(out.valid, ~torch.isnan(torch.tensor(groups)))


def test_advantages_sum_to_zero_and_have_unit_spread():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [2.0, -1.0, 0.5, 7.0]])
    advantages = group_advantages(rewards, normalize_std=True).advantages.double()
    torch.testing.assert_close(advantages.sum(1), torch.zeros(2).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(advantages.std(1), torch.ones(2).double(), rtol=0, atol=1e-5)


def test_masked_row_leaves_the_rest_of_its_group_alone():
    """A None or NaN reward masks its own row, nothing else."""
    out = group_advantages(torch.tensor([[1.0, NAN, 0.0, 1.0]]), normalize_std=True)
    rest = group_advantages(torch.tensor([[1.0, 0.0, 1.0]]), normalize_std=True)
    assert torch.equal(out.advantages[:, [0, 2, 3]], rest.advantages)
    assert out.advantages[0, 1] == 0.0
    assert out.valid.tolist() == [[True, False, True, True]]


@pytest.mark.parametrize("group", [[NAN, NAN, NAN], [NAN, 1.0, NAN]])
def test_a_group_with_fewer_than_two_rewards_teaches_nothing(group):
    out = group_advantages(torch.tensor([group]), normalize_std=True)
    assert out.advantages.tolist() == [[0.0] * 3]
    assert out.zero_spread.tolist() == [True]


def test_zero_spread_is_by_range_not_by_standard_deviation():
    """The float32 standard deviation of equal rewards need not be 0."""
    equal = torch.full((1, 7), 0.1)
    assert equal.std() > 0.0  # what makes the test worth having
    out = group_advantages(equal, normalize_std=True)
    assert out.zero_spread.tolist() == [True]
    assert out.advantages.tolist() == [[0.0] * 7]
    barely = group_advantages(torch.tensor([[0.0, 1e-5]]), normalize_std=True)
    assert barely.zero_spread.tolist() == [False]
    assert (barely.advantages != 0.0).all()


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2, 2)])
def test_groups_need_at_least_two_completions(shape):
    with pytest.raises(ValueError, match="n >= 2"):
        group_advantages(torch.zeros(shape), normalize_std=True)


def test_infinite_reward_is_refused():
    with pytest.raises(ValueError, match="infinity"):
        group_advantages(torch.tensor([[math.inf, 0.0]]), normalize_std=True)


def test_overlong_penalty_is_daposs():
    lengths = torch.tensor([0, 15, 16, 17, 18, 20, 25])
    expected = [0.0, 0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert overlong_penalty(lengths, 20, 4).tolist() == expected


@pytest.mark.parametrize("buffer", [0, -1, 21])
def test_overlong_buffer_out_of_bounds(buffer):
    with pytest.raises(ValueError, match=f"got {buffer}"):
        overlong_penalty(torch.tensor([1]), 20, buffer)
