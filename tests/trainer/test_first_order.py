"""The entropy's gradient and the change that it predicts, on policies that need no DeepSpeed."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from papo.config import OptimConfig, TrainConfig
from papo.dist import collectives
from papo.policy.batch import TrainingSequence
from papo.policy.module import Policy
from papo.policy.prediction import PREDICTIONS, EntropyPrediction, correlation_of
from papo.policy.update import Update
from papo.record.telemetry import StageClock
from papo.train.entropy import EntropyGradient, share_of
from papo.train.loop import Loop
from papo.train.session import Session
from tests.trainer.bigram import BATCHER, Bigram, PlainEngine, PolicyEngine, measured_update, passes
from tests.trainer.ranks import on_ranks
from tests.trainer.tiny import small_llama

V = 32
FIRST, THROUGH, _ = PREDICTIONS


def completions(seed: int, lengths: tuple[int, ...] = (8,) * 8) -> list[TrainingSequence]:
    """Two a group, with random tokens and advantages, each token with its part of the mean."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i, n in enumerate(lengths):
        ids = torch.randint(0, V, (n + 1,), generator=g).tolist()
        advantage = float(torch.randn((), generator=g))
        logp = (-math.log(V),) * n
        made.append(
            TrainingSequence((ids[0],), tuple(ids[1:]), logp, advantage, 1 / sum(lengths), i // 2)
        )
    return made


def bigram(optim: OptimConfig) -> Bigram:
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Bigram(optim, table)


def llama(optim: OptimConfig, dropout: bool = False) -> PolicyEngine:
    causal_lm = small_llama(0, vocab_size=V, initializer_range=0.2, attention_dropout=0.3).double()
    return PolicyEngine(optim, Policy(causal_lm, temperature=1.0, dropout=dropout))


# ---- the gradient -------------------------------------------------------------------------------


def entropy_gradient(engine: Bigram, part: list[TrainingSequence]) -> torch.Tensor:
    """Of the mean over all tokens, by torch."""
    table = engine.table.detach().requires_grad_()
    fed = [t for s in part for t in (*s.prompt_ids, *s.response_ids)[:-1]]
    logp = table[fed].log_softmax(-1)
    return torch.autograd.grad(-(logp.exp() * logp).sum(-1).mean(), table)[0]


def test_it_is_of_the_mean_entropy_of_the_tokens_of_a_share() -> None:
    """Whatever the micro-batches; completions that do not train have no part."""
    part = completions(0, (3, 5, 2, 6, 4, 7, 1, 4))
    out = [replace(s, weight=0.0) for s in completions(1, (9, 9))]
    expected = entropy_gradient(bigram(OptimConfig()), [part[i] for i in (1, 3, 5, 7)])
    for size in (64, 3):
        engine = bigram(OptimConfig())
        norm = EntropyGradient(engine, passes(engine, size), 0.5, 0.9).take([*part, *out])
        torch.testing.assert_close(engine.average[0], expected, rtol=1e-9, atol=1e-12)
        assert norm == pytest.approx(float(expected.norm())) and norm > 0.01
        assert engine.table.grad is None and not engine.adamw.state


def test_it_does_not_depend_on_which_ranks_hold_the_completions() -> None:
    """One of them may hold none of the share: it makes as many passes as the others."""
    part = completions(0, (3, 5, 2, 6, 4, 7, 1, 4))
    held = part[:6], part[6:], []
    expected = entropy_gradient(bigram(OptimConfig()), [part[i] for i in (1, 3, 5, 7)])

    def work() -> tuple[torch.Tensor, int]:
        engine = bigram(OptimConfig())
        EntropyGradient(engine, passes(engine, 1), 0.5, 0.9).take(held[collectives.rank()])
        return engine.average[0], len(engine.evaluated)

    gradients, counts = zip(*on_ranks(3, work), strict=True)
    assert set(counts) == {3}
    torch.testing.assert_close(sum(gradients), expected, rtol=1e-9, atol=1e-12)


def test_a_step_without_a_completion_leaves_no_trace() -> None:
    engine = bigram(OptimConfig())
    gradient = EntropyGradient(engine, passes(engine), 0.125, 0.8)
    idle = [replace(s, weight=0.0) for s in completions(0)]
    for part in ([], idle):
        assert math.isnan(gradient.take(part))
    assert not engine.average and not engine.evaluated
    done, _ = measured_update(engine, completions(0))
    assert done.applied and math.isnan(done.first_order)
    gradient.take(completions(1))
    kept = [a.clone() for a in engine.average]
    gradient.take([])
    assert all(map(torch.equal, engine.average, kept))


def test_with_dropout_it_is_the_policys_own() -> None:
    engine, other = llama(OptimConfig(), dropout=True), llama(OptimConfig())
    state = torch.get_rng_state()
    for e in (engine, other):
        EntropyGradient(e, passes(e), 1.0, 0.0).take(completions(0))
    assert all(map(torch.equal, engine.average, other.average))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_share_comes_from_every_part_of_the_batch() -> None:
    part = completions(0, (4,) * 32)
    assert [s.group for s in share_of(part, 0.125)] == [2, 6, 10, 14]
    assert len(share_of(part, 1e-9)) == 1 and share_of(part, 1.0) == part


# ---- the prediction -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bigram, llama])
def test_first_order_is_the_measured_change_of_a_small_step_and_polarity_is_not(make: Any) -> None:
    """Clipping, momentum and weight decay included, in nats: at such a rate second order is 1% of
    it. Tokens share parameters, of which polarity knows nothing."""
    options = OptimConfig(eps=1e-4, max_grad_norm=0.1, weight_decay=0.1)
    engine = make(options)
    gradient = EntropyGradient(engine, passes(engine), 1.0, 0.0)
    prediction = EntropyPrediction(options, engine.trained_numel)
    rows, clipped = [], 0
    for k in range(16):
        part = completions(k)
        gradient.take(part)
        done, measurement = measured_update(engine, part, lr=1e-5)
        figures = prediction.observe([measurement.measure(done)])
        rows.append([figures[n] for n in (FIRST, THROUGH, "entropy/measured_delta")])
        clipped += done.grad_norm > 0.1
    first, through, measured = torch.tensor(rows, dtype=torch.float64).T
    assert clipped > 8
    assert float(first @ measured / first.square().sum()) == pytest.approx(1.0, abs=0.02)
    assert (first - measured).norm() < 0.02 * measured.norm()
    scale = through @ measured / through.square().sum()  # the best that there is
    assert (scale * through - measured).norm() > 0.5 * measured.norm()
    assert figures[correlation_of(FIRST)] > 0.99
    assert figures[correlation_of(THROUGH)] < 0.9


# ---- in the loop --------------------------------------------------------------------------------


def trained(
    share: float, dropout: bool, steps: int = 5
) -> tuple[PlainEngine, list[Update], Any, list[dict[str, float]]]:
    """Steps of two updates by the stages of `Session`; the random numbers' state after them, and
    what was said of the entropy's gradient."""
    config = TrainConfig(
        name="test",
        steps=steps,
        model={"path": "somewhere", "dropout": dropout, "probe": False},
        data={"source": "reasoning_gym", "dataset": "chain_sum"},
        rollout={"prompts_per_step": 4, "completions_per_prompt": 2, "max_new_tokens": 8},
        optim={"lr": 1e-3, "updates_per_rollout": 2, "max_grad_norm": 0.1},
        loss={"max_sampler_kl": "none"},
        metrics={"predict_share": share, "predict_every": 2},
    )
    session = Session.__new__(Session)
    session.config, session.progress = config, SimpleNamespace(say=pytest.fail)
    session.engine, session.batcher = llama(config.optim, dropout), BATCHER
    session.passes, session.reference = passes(session.engine, 3), None
    session._make_stages()
    loop, updates, gradients = Loop(config, session), [], []
    for step in range(steps):
        sequences = completions(step)
        gradients.append(loop._take_entropy_gradient(sequences))
        updates += loop._updates(sequences, 0.5, StageClock())
        loop.step += 1
    return session.engine, updates, torch.get_rng_state(), gradients


@pytest.mark.parametrize("dropout", [False, True])
def test_training_is_the_same_with_and_without_a_prediction(dropout: bool) -> None:
    """Weights, moments and random numbers, bit for bit."""
    engine, updates, random, gradients = trained(0.5, dropout)
    other, expected, other_random, none = trained(0.0, dropout)
    assert [list(said) for said in gradients] == [["entropy/gradient_norm"], []] * 2 + [
        ["entropy/gradient_norm"]
    ]
    assert all(value > 0.0 for said in gradients for value in said.values()) and not any(none)
    assert all(map(torch.equal, engine.parameters, other.parameters))
    for mine, theirs in zip(engine.parameters, other.parameters, strict=True):
        states = engine.adamw.state[mine], other.adamw.state[theirs]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    assert torch.equal(random, other_random)
    assert engine.average and not other.average
    for done, plain in zip(updates, expected, strict=True):
        assert math.isfinite(done.first_order) and math.isnan(plain.first_order)
        assert replace(done, first_order=0.0) == replace(plain, first_order=0.0)
