"""How many ranks share a step changes nothing that it samples, keeps, cuts, measures or records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM

from papo.config import TrainConfig
from papo.policy.batch import TrainingSequence
from papo.record.completions import completion_rows
from papo.record.telemetry import StageClock
from papo.rollout import HFSampler
from papo.train.entropy import EntropyMeasurement
from papo.train.experience import Collected, collect, mini_batches, to_sequences
from papo.train.rounds import SamplingRounds
from papo.types import Completion, Problem, Reward
from tests.trainer.bigram import VOCABULARY, Bigram, passes
from tests.trainer.ranks import on_ranks
from tests.trainer.tiny import small_llama

EOS, PROMPTS, COPIES, UPDATES = 0, 4, 3, 2


class Problems:
    """Prompts of different lengths, without end."""

    def batch(self, cursor: int, n: int) -> list[Problem]:
        return [
            Problem(uid, ({"role": "user", "content": str(uid)},), "", {}, (1,) * (1 + uid % 5))
            for uid in range(cursor, cursor + n)
        ]


class Tokenizer:
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


class Rewards:
    """What a completion's text alone determines; seldom 1, so that many groups have no spread."""

    def score(self, completions: Sequence[Completion]) -> list[Reward]:
        return [Reward(float(sum(c.response_ids) % 5 == 0), "ok") for c in completions]


class Step(NamedTuple):
    """A rank's part of a step."""

    collected: Collected
    cursor: int
    parts: list[list[TrainingSequence]]
    measured: list[TrainingSequence]


def options() -> TrainConfig:
    return TrainConfig(
        name="test",
        steps=1,
        model={"path": "unused"},
        data={"source": "reasoning_gym", "dataset": "chain_sum"},
        rollout={
            "prompts_per_step": PROMPTS,
            "completions_per_prompt": COPIES,
            "max_new_tokens": 6,
            "batch_size": 5,
            "top_p": 0.9,
        },
        dynamic_sampling={"enabled": True, "max_rounds": 4},
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return small_llama(3, vocab_size=VOCABULARY, eos_token_id=EOS, pad_token_id=EOS).eval()


def step(model: LlamaForCausalLM, config: TrainConfig) -> Step:
    """Sample, choose, cut and measure; what a rank has of it."""
    rounds: Any = SamplingRounds(
        config, Problems(), HFSampler(Tokenizer(), [EOS], EOS), Rewards(), model, StageClock(), 3, 8
    )
    collected = collect(rounds, PROMPTS, config.dynamic_sampling)
    sequences = [replace(s, weight=0.1) for s in to_sequences(collected.groups)]
    parts = mini_batches(sequences, UPDATES)
    over = passes(Bigram(config.optim, torch.zeros(VOCABULARY, VOCABULARY)), 2)
    measurement = EntropyMeasurement.of(over, over.pieces(parts[0]), tokens=12)
    measured = [s for piece in measurement.pieces for s in piece if s.weight > 0]
    return Step(collected, rounds.cursor, parts, measured)


def rows_of(sequences: Iterable[TrainingSequence]) -> list[tuple[Any, ...]]:
    """What tells sequences apart, in the order of the groups."""
    rows = [(s.group, s.prompt_ids, s.response_ids, s.advantage) for s in sequences]
    return sorted(rows, key=lambda row: row[0])


def test_a_step_samples_keeps_cuts_and_measures_the_same(model) -> None:
    one, *more = ([*on_ranks(world, lambda: step(model, options()))] for world in (1, 2, 4))
    (whole,) = one
    indices = [g.index for g in whole.collected.sampled]
    assert indices == list(range(PROMPTS * whole.collected.rounds)) and len(indices) > PROMPTS
    spread = [g.index for g in whole.collected.sampled if not g.zero_spread]
    kept = [g.index for g in whole.collected.groups]
    assert kept == spread[:PROMPTS] and len(spread) > PROMPTS
    assert [len({s.group for s in part}) for part in whole.parts] == [PROMPTS // UPDATES] * UPDATES
    assert 0 < len(whole.measured) < len(whole.parts[0])
    for ranks in more:
        for r, rank in enumerate(ranks):
            assert [g.index % len(ranks) for g in rank.collected.sampled] == (
                [r] * (len(indices) // len(ranks))
            )
            assert (rank.collected.rounds, rank.cursor) == (whole.collected.rounds, whole.cursor)
        for u in range(UPDATES):
            shares = [len({s.group for s in r.parts[u]}) for r in ranks]
            assert max(shares) == max(1, PROMPTS // UPDATES // len(ranks))
            assert rows_of(s for r in ranks for s in r.parts[u]) == rows_of(whole.parts[u])
        assert rows_of(s for r in ranks for s in r.measured) == rows_of(whole.measured)


def test_completions_are_recorded_in_the_same_order_under_the_same_numbers(model) -> None:
    def rows() -> list[dict[str, Any]]:
        return completion_rows(step(model, options()).collected.sampled)

    (expected,) = on_ranks(1, rows)
    groups = [g for g in range(len(expected) // COPIES) for _ in range(COPIES)]
    assert [row["group"] for row in expected] == groups
    for world in (2, 4):
        assert on_ranks(world, rows) == [expected] * world
