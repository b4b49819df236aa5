"""Held-out accuracy: what is counted, how it is sampled, and who samples what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from papo.dist import collectives
from papo.errors import PapoError
from papo.rollout import SamplingParams
from papo.train.evaluate import Evaluator
from papo.train.schedule import seed_of
from papo.types import Completion, Problem, Reward

PROBLEMS = [Problem(uid, (), "", {}, (1,)) for uid in range(3)]
# Of problem 0, 1, 2: four samples and the greedy completion, by their rewards; `c` ran into the
# limit and is masked.
SAMPLED = {0: ["1", ".9", "1", "c"], 1: [".9", ".9", "c", "c"], 2: ["1", "1", "1", "1"]}
GREEDY = {0: ".9", 1: "1", 2: "c"}
ALL = {
    "accuracy": 6 / 9,
    "pass_at_k": 2 / 3,
    "reward": (6 + 3 * 0.9) / 9,
    "truncated": 3 / 12,
    "invalid": 4.0,
    "problems": 3.0,
    "greedy": 1 / 2,
    "reward_greedy": 1.9 / 2,
}


class Sampler:
    """Gives the completions above and remembers how it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int, SamplingParams, list[int]]] = []

    def sample(
        self,
        model: Any,
        problems: Sequence[Problem],
        copies: int,
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[Completion]:
        assert model == "model"
        self.asked.append(([p.uid for p in problems], copies, params, list(seeds)))
        texts = [
            (p, text)
            for p in problems
            for text in ([GREEDY[p.uid]] if params.temperature == 0 else SAMPLED[p.uid][:copies])
        ]
        return [Completion(p, (2,), (0.0,), "c" in text, text) for p, text in texts]


def score(completions: Sequence[Completion]) -> list[Reward]:
    """What the text says; `c` is masked."""
    return [
        Reward(math.nan, "invalid") if "c" in c.text else Reward(float(c.text), "ok")
        for c in completions
    ]


def run(problems: Sequence[Problem] = PROBLEMS, **options: Any) -> tuple[dict[str, float], Sampler]:
    sampler = Sampler()
    params = SamplingParams(24, temperature=0.6, top_p=0.9, top_k=20, batch_size=5)
    rewards: Any = SimpleNamespace(score=options.pop("score", score))
    options = {"samples": 4, "with_greedy": True, "success": 1.0, "seed": 7, **options}
    return Evaluator(sampler, rewards, params, **options).evaluate("model", problems), sampler


def test_accuracy_pass_at_k_reward_truncated_and_greedy_by_hand() -> None:
    """Masked completions are counted, and are in no mean."""
    assert run()[0] == pytest.approx(ALL)


def test_a_verifier_that_gives_less_than_1_for_a_right_answer_has_its_own_threshold() -> None:
    """With the default its accuracy may be 0; its mean reward shows it all the same."""

    def at_most_nine_tenths(completions: Sequence[Completion]) -> list[Reward]:
        return [Reward(0.9 * r.value, r.status) for r in score(completions)]

    default = run(score=at_most_nine_tenths)[0]
    assert default["accuracy"] == default["pass_at_k"] == default["greedy"] == 0.0
    assert default["reward"] == pytest.approx(0.9 * ALL["reward"])
    assert default["reward_greedy"] == pytest.approx(0.9 * ALL["reward_greedy"])
    own = run(score=at_most_nine_tenths, success=0.9)[0]
    for name in ("accuracy", "pass_at_k", "greedy"):
        assert own[name] == pytest.approx(ALL[name])


@pytest.mark.parametrize(("success", "accuracy"), [(0.0, 9 / 9), (0.5, 9 / 9), (1.0, 6 / 9)])
def test_accuracy_counts_rewards_from_the_threshold_on(success: float, accuracy: float) -> None:
    assert run(success=success)[0]["accuracy"] == pytest.approx(accuracy)


def test_a_sum_of_tenths_reaches_1() -> None:
    assert sum([0.1] * 10) < 1.0
    assert Reward(sum([0.1] * 10), "ok").succeeds(1.0)
    assert not Reward(0.999, "ok").succeeds(1.0)
    assert not Reward(math.nan, "invalid").succeeds(-math.inf)


def test_a_problem_whose_samples_are_all_masked_is_in_no_share() -> None:
    def masks_problem_0(completions: Sequence[Completion]) -> list[Reward]:
        return [
            Reward(math.nan, "invalid") if c.problem.uid == 0 else r
            for c, r in zip(completions, score(completions), strict=True)
        ]

    figures = run(score=masks_problem_0)[0]
    assert figures["pass_at_k"] == pytest.approx(1 / 2)
    assert figures["accuracy"] == pytest.approx(4 / 6)


def test_where_nothing_has_a_reward_there_is_no_accuracy_either() -> None:
    """0 would say that every answer was wrong."""

    def masks_all(completions: Sequence[Completion]) -> list[Reward]:
        return [Reward(math.nan, "invalid")] * len(completions)

    assert run(score=masks_all)[0] == {
        "invalid": 15.0,
        "problems": 3.0,
        "truncated": pytest.approx(ALL["truncated"]),
    }


def test_samples_are_drawn_from_the_policy_itself_whatever_the_rollouts_settings() -> None:
    _, sampler = run()
    seeds = [seed_of(7, "evaluation", i) for i in range(3)]
    assert sampler.asked == [
        ([0, 1, 2], 4, SamplingParams(24, temperature=1.0, batch_size=5), seeds),
        ([0, 1, 2], 1, SamplingParams(24, temperature=0.0, batch_size=5), seeds),
    ]


def test_without_greedy_nothing_is_decoded_greedily() -> None:
    figures, sampler = run(with_greedy=False)
    assert figures == pytest.approx(
        {k: v for k, v in ALL.items() if "greedy" not in k} | {"invalid": 3.0}
    )
    assert len(sampler.asked) == 1


def test_no_problems_is_zero_not_a_division_by_it() -> None:
    figures, sampler = run([])
    assert set(figures.values()) == {0.0} and not sampler.asked


def test_ranks_share_the_problems_and_the_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four ranks, one without a problem: each samples its own with the seeds that one rank would
    use, the sums make the figures of all.
    """
    parts: list[dict[str, float]] = []
    monkeypatch.setattr(collectives, "world_size", lambda: 4)
    monkeypatch.setattr(collectives, "gather_objects", lambda value: [value])
    for rank in range(4):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(collectives, "sum_named", lambda sums: parts.append(sums) or sums)
        _, sampler = run()
        own = ([rank], [seed_of(7, "evaluation", rank)])
        asked = [(uids, seeds) for uids, _, _, seeds in sampler.asked]
        assert asked == ([own] * 2 if rank < 3 else [])
    everyones = {name: sum(part[name] for part in parts) for name in parts[0]}
    monkeypatch.setattr(collectives, "sum_named", lambda sums: everyones)
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
