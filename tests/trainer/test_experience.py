"""Scoring groups, dynamic sampling and the cut into mini-batches."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papo.dist import collectives
from papo.errors import PapoError
from papo.policy.advantage import ScoredGroup, score_groups
from papo.train.experience import (
    Collected,
    collect,
    mini_batches,
    takers_of,
    to_sequences,
    with_token_weights,
)
from papo.types import Completion, Problem, Reward
from tests.trainer.ranks import on_ranks


@dataclass(frozen=True)
class Advantage:
    normalize_std: bool = True
    overlong: str = "none"
    overlong_buffer: int = 0


@dataclass(frozen=True)
class Dynamic:
    enabled: bool = True
    max_rounds: int = 3
    on_exhausted: str = "train_smaller"


@dataclass(frozen=True)
class Loss:
    aggregation: str = "token"
    constant_length: int | None = None


def completions(groups: int, n: int, length: int = 4, truncated: bool = False) -> list[Completion]:
    return [
        Completion(
            Problem(g, (), "", {}, (1, g)),
            tuple(range(length + i)),
            (0.0,) * (length + i),
            truncated,
            "",
        )
        for g in range(groups)
        for i in range(n)
    ]


def scored(
    values: list[list[float]],
    advantage: Advantage = Advantage(),
    first: int = 0,
    step: int = 1,
    **kwargs,
) -> list[ScoredGroup]:
    indices = range(first, first + step * len(values), step)
    flat = [Reward(v, "invalid" if math.isnan(v) else "ok") for row in values for v in row]
    return score_groups(
        completions(len(values), len(values[0]), **kwargs), flat, indices, advantage, 8
    )


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1.0, math.nan]), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=50, deadline=None)
def test_rows_keep_their_identity(values: list[list[float]]) -> None:
    groups = scored(values)
    for g, group in enumerate(groups):
        sizes = {
            len(group.completions),
            len(group.rewards),
            len(group.advantages),
            len(group.used),
            len(group.shaped),
        }
        assert sizes == {3}
        assert [c.problem.uid for c in group.completions] == [g] * 3
        assert list(group.used) == [not math.isnan(v) for v in values[g]]
    rows = [(g, i) for g, row in enumerate(values) for i, v in enumerate(row) if not math.isnan(v)]
    made = to_sequences(groups)
    assert [(s.group, len(s.response_ids) - 4) for s in made] == rows
    assert all(math.isfinite(s.advantage) for s in made)


def test_masked_truncated_completions_leave_nothing_and_no_zero_division() -> None:
    groups = scored([[1.0, 0.0]], Advantage(overlong="mask"), truncated=True)
    assert groups[0].used == (False, False)
    assert with_token_weights(to_sequences(groups), Loss()) == []


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("token", [1 / 9, 1 / 9]), ("sequence", [1 / 8, 1 / 10]), ("constant", [1 / 16, 1 / 16])],
)
def test_the_loss_is_the_mean_that_its_aggregation_names(
    aggregation: str, expected: list[float]
) -> None:
    """Of completions of 4 and 5 tokens."""
    sequences = to_sequences(scored([[1.0, 0.0]]))
    weighted = with_token_weights(sequences, Loss(aggregation, constant_length=8))
    assert [s.weight for s in weighted] == expected


def test_soft_overlong_penalty_shapes_the_reward_only() -> None:
    group = scored([[1.0, 1.0, 1.0, 1.0]], Advantage(overlong="soft", overlong_buffer=4), length=4)[
        0
    ]
    assert group.shaped == (1.0, 0.75, 0.5, 0.25)
    assert [r.value for r in group.rewards] == [1.0] * 4 and not group.zero_spread


MIXED, FLAT = [1.0, 0.0], [0.0, 0.0]


class Rounds:
    """Rounds with these rewards on this rank, one after the other."""

    def __init__(self, rewards: Iterable[list[list[float]]]) -> None:
        self._rewards = iter(rewards)
        self._sampled = 0

    def next(self) -> list[ScoredGroup]:
        world = collectives.world_size()
        first = self._sampled * world + collectives.rank()
        found = scored(next(self._rewards), first=first, step=world)
        self._sampled += len(found)
        return found


def test_dynamic_sampling_fills_up_and_keeps_what_it_sampled() -> None:
    rounds = [[MIXED, FLAT], [FLAT, FLAT], [MIXED, MIXED]]
    got = collect(Rounds(rounds), 2, Dynamic())
    assert got.rounds == 3 and [g.index for g in got.sampled] == list(range(6))
    assert [g.index for g in got.groups] == [0, 4]


@pytest.mark.parametrize(("policy", "kept"), [("train_smaller", 1), ("skip", 0)])
def test_exhausted_budget_follows_the_policy(policy: str, kept: int) -> None:
    rounds = [[MIXED, FLAT], [FLAT, FLAT], [FLAT, FLAT]]
    got = collect(Rounds(rounds), 2, Dynamic(on_exhausted=policy))
    assert len(got.groups) == kept and got.rounds == 3


def test_exhausted_budget_can_be_an_error() -> None:
    with pytest.raises(
        PapoError, match=r"dynamic sampling: 0 of 2 groups have mixed rewards after 3 rounds"
    ):
        collect(Rounds([[FLAT, FLAT]] * 3), 2, Dynamic(on_exhausted="error"))


def test_rounds_depend_on_all_ranks() -> None:
    """A rank that has enough at once samples on as long as the other has too little."""

    def work() -> Collected:
        each = [MIXED] if collectives.rank() == 0 else [FLAT]
        return collect(Rounds([each] * 3), 4, Dynamic(max_rounds=3))

    rich, poor = on_ranks(2, work)
    assert (rich.rounds, poor.rounds) == (3, 3)
    assert [[g.index for g in r.sampled] for r in (rich, poor)] == [[0, 2, 4], [1, 3, 5]]
    # The second group has moved, so that neither waits long for the other.
    assert [[g.index for g in r.groups] for r in (rich, poor)] == [[0, 4], [2]]


@given(st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1)))))
def test_of_as_many_groups_as_there_are_ranks_each_takes_one(case: tuple[int, list[int]]) -> None:
    world, holders = case
    takers = takers_of(holders, world)
    assert len(takers) == len(holders)
    for start in range(0, len(holders), world):
        held, taken = holders[start : start + world], takers[start : start + world]
        assert len(set(taken)) == len(taken) and set(taken) <= set(range(world))
        assert all(taken[held.index(rank)] == rank for rank in set(held))


@given(st.integers(1, 7), st.integers(1, 4))
def test_mini_batches_never_split_a_group(groups: int, updates: int) -> None:
    sequences = to_sequences(scored([[1.0, 0.0, 1.0]] * groups))
    parts = mini_batches(sequences, updates)
    assert len(parts) == updates and [s for p in parts for s in p] == sequences
    for a in range(updates):
        for b in range(a + 1, updates):
            assert not {s.group for s in parts[a]} & {s.group for s in parts[b]}
