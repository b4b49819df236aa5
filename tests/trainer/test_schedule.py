"""Learning rate and seeds."""

import math
from dataclasses import dataclass

import pytest

from papo.train.schedule import learning_rate, seed_of


@dataclass(frozen=True)
class Optim:
    lr: float = 2.0
    warmup_steps: int = 4
    schedule: str = "constant"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda x: 2.0),
        ("linear", lambda x: 2 - 2 * x),
        ("cosine", lambda x: 1 + math.cos(math.pi * x)),
    ],
)
def test_learning_rate(schedule: str, expected) -> None:
    optim = Optim(schedule=schedule)
    assert [learning_rate(k, 14, optim) for k in range(4)] == [0.5, 1.0, 1.5, 2.0]
    for k in range(4, 14):
        assert learning_rate(k, 14, optim) == pytest.approx(expected((k - 4) / 10))


def test_seeds_depend_on_every_part_of_their_purpose_and_nothing_else() -> None:
    purposes = [
        (s, p, k, i)
        for s in (0, 1)
        for p in ("rollout", "evaluation")
        for k in (0, 1, 12)
        for i in (0, 1, 2)
    ]
    seeds = {seed_of(*purpose) for purpose in purposes}
    assert len(seeds) == len(purposes)
    assert seed_of(0, "rollout", 3, 1) == seed_of(0, "rollout", 3, 1) < 2**63
