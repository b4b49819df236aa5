"""Held-out accuracy: what is counted, how it is sampled, and who samples what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from papo import collectives
from papo.errors import PapoError
from papo.evaluate import evaluate
from papo.rollout import SamplingParams
from papo.types import Completion, Problem, Reward

PROBLEMS = [Problem(uid, (), "", {}, (1,)) for uid in range(3)]
# Of problem 0, 1, 2: four samples and the greedy completion; 1 is right, `c` ran into the limit.
SAMPLED = {0: ["1", "0", "1", "0c"], 1: ["0", "0", "0c", "0c"], 2: ["1", "1", "1", "1"]}
GREEDY = {0: "0", 1: "1", 2: "1"}
ALL = {
    "accuracy": 6 / 12,
    "pass_at_k": 2 / 3,
    "truncated": 3 / 12,
    "problems": 3.0,
    "greedy": 2 / 3,
}


class Sampler:
    """Gives the completions above and remembers how it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int, SamplingParams, int]] = []

    def sample(
        self,
        model: Any,
        problems: Sequence[Problem],
        copies: int,
        params: SamplingParams,
        seed: int,
    ) -> list[Completion]:
        assert model == "model"
        self.asked.append(([p.uid for p in problems], copies, params, seed))
        texts = [
            (p, text)
            for p in problems
            for text in ([GREEDY[p.uid]] if params.temperature == 0 else SAMPLED[p.uid][:copies])
        ]
        return [Completion(p, (2,), (0.0,), "c" in text, text) for p, text in texts]


def score(completions: Sequence[Completion]) -> list[Reward]:
    """Partial credit is not a right answer, a masked one neither."""
    values = {"1": 1.0, "0": 0.9, "0c": float("nan")}
    return [Reward(values[c.text], "ok") for c in completions]


def run(problems: Sequence[Problem] = PROBLEMS, **options: Any) -> tuple[dict[str, float], Sampler]:
    sampler = Sampler()
    params = SamplingParams(24, temperature=0.6, top_p=0.9, top_k=20, batch_size=5)
    options = {"samples": 4, "with_greedy": True, "seed": 7, **options}
    return evaluate(
        "model", sampler, problems, params, options.pop("score", score), **options
    ), sampler


def test_accuracy_pass_at_k_truncated_and_greedy_by_hand() -> None:
    assert run()[0] == pytest.approx(ALL)


def test_samples_are_drawn_from_the_policy_itself_whatever_the_rollouts_settings() -> None:
    _, sampler = run()
    assert sampler.asked == [
        ([0, 1, 2], 4, SamplingParams(24, temperature=1.0, batch_size=5), 7),
        ([0, 1, 2], 1, SamplingParams(24, temperature=0.0, batch_size=5), 7),
    ]


def test_without_greedy_nothing_is_decoded_greedily() -> None:
    figures, sampler = run(with_greedy=False)
    assert figures == pytest.approx({k: v for k, v in ALL.items() if k != "greedy"})
    assert len(sampler.asked) == 1


def test_no_problems_is_zero_not_a_division_by_it() -> None:
    figures, sampler = run([])
    assert set(figures.values()) == {0.0} and not sampler.asked


def test_requirement_3_ranks_share_the_problems_and_the_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four ranks, one without a problem: each samples its own, the sums make the figures of all."""
    parts = []
    monkeypatch.setattr(collectives, "world_size", lambda: 4)
    monkeypatch.setattr(collectives, "gather_objects", lambda value: [value])
    for rank in range(4):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(collectives, "all_sum", lambda sums: parts.append(sums) or sums)
        _, sampler = run()
        assert [uids for uids, *_ in sampler.asked] == ([[rank]] * 2 if rank < 3 else [])
    monkeypatch.setattr(collectives, "all_sum", lambda sums: sum(parts))
    assert run()[0] == pytest.approx(ALL)


def test_a_failure_on_one_rank_reaches_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the sums are reduced: the others would wait for this rank's."""

    def broken(completions: Sequence[Completion]) -> list[Reward]:
        raise PapoError("reward workers died")

    told: list[Any] = []
    monkeypatch.setattr(collectives, "gather_objects", lambda value: told.append(value) or [value])
    with pytest.raises(PapoError, match="reward workers died"):
        run(score=broken)
    assert told == ["reward workers died"]
