"""An update's figures on a policy that needs no engine: what is predicted, what is measured."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from papo.config import OptimConfig
from papo.dist import collectives
from papo.policy.batch import TrainingSequence
from papo.policy.update import TokenSums, Update, policy_gradient, token_sums
from papo.policy.weighting import BranchSums
from papo.train.entropy import EntropyMeasurement, spread
from papo_kernels import Objective, PolarityWeighting, policy_loss, token_stats
from papo_kernels.objective import SURROGATES
from tests.trainer.bigram import (
    BATCHER,
    VOCABULARY,
    Bigram,
    measured_update,
    passes,
    run_update,
)

V = VOCABULARY


def sequences(*lengths: int) -> list[TrainingSequence]:
    """Completions of these lengths, every second one without weight."""
    return [
        TrainingSequence(
            (1, 2), tuple(range(n)), (0.0,) * n, (-1.0) ** (i // 2), float((i + 1) % 2), i
        )
        for i, n in enumerate(lengths)
    ]


def logits_of(n: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))


def sums_of(part: list[TrainingSequence], **loss: Any) -> tuple[TokenSums, Any, Any]:
    """The sums of a micro-batch of `part` with made-up logits, the batch and the loss's output."""
    batch = BATCHER.batch(part)
    logits = loss.pop("logits", None)
    if logits is None:
        logits = logits_of(len(batch.targets))
    objective = loss.setdefault("objective", Objective())
    inputs = batch.loss_inputs(objective.ratio_level)
    out = policy_loss(logits, batch.targets, **{**inputs, **loss})
    gradient = policy_gradient(out, batch, objective)
    return TokenSums.of(collectives.sum_named(token_sums(out, batch, gradient))), batch, out


def bigram(seed: int = 0, **options: Any) -> Bigram:
    g = torch.Generator().manual_seed(seed)
    return Bigram(OptimConfig(**options), torch.randn(VOCABULARY, VOCABULARY, generator=g))


def weighted(*lengths: int) -> list[TrainingSequence]:
    """Completions of these lengths that all train, each token with its part of the mean."""
    return [replace(s, weight=1 / sum(lengths)) for s in sequences(*lengths)]


# ---- what is predicted --------------------------------------------------------------------------


def test_what_is_predicted_is_weighted_polarity_and_nothing_where_it_is_clipped() -> None:
    part = [replace(s, weight=0.25 * s.weight) for s in sequences(4, 4, 4)]
    batch = BATCHER.batch(part)
    logp = token_stats(logits_of(12), batch.targets).logp
    old = logp - torch.tensor([0.6, 0.05, -0.6]).repeat(4)  # ratios: 1.8, 1.05, 0.55
    weighting = PolarityWeighting(strength=0.5, phase=1.0)
    part = [replace(s, old_logp=o) for s, o in zip(part, old.split(4), strict=True)]
    sums, _, out = sums_of(part, weighting=weighting)
    live = batch.token_weight > 0
    assert out.clipped[live].any() and not out.clipped[live].all()
    assert set(out.weight[live].tolist()) == {0.5, 1.5}
    each = out.weight * out.ratio * batch.advantages * out.unit_polarity
    expected = 0.25 * each[live & ~out.clipped].sum().item()
    assert sums.predicted == pytest.approx(expected, rel=1e-5) and abs(expected) > 1e-3


def test_what_a_token_that_does_not_train_holds_is_not_predicted_from() -> None:
    part = sequences(3, 2, 3)  # the second has no weight
    logits = logits_of(8)
    expected, _, _ = sums_of(part, logits=logits)
    logits[3:5] = torch.nan
    assert sums_of(part, logits=logits)[0].predicted == expected.predicted != 0.0


OBJECTIVES = [
    Objective(dual_clip=1.5),
    *(Objective(surrogate=name) for name in SURROGATES[1:]),
    Objective(ratio_level="sequence", clip_low=0.02),
    Objective(ratio_level="sequence_token", surrogate="cispo"),
    Objective(log_ratio_limit=0.1, clip_high=1.0),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_prediction_is_the_entropy_change_of_a_step_in_logit_space(
    objective: Objective,
) -> None:
    """Where every token has logits of its own (no shared weights), a small step along the loss's
    gradient changes the entropy by exactly what is predicted, to first order; so too where
    completions weigh differently (`loss.aggregation: sequence`), and for every surrogate.
    """
    part = [replace(s, weight=w) for s, w in zip(sequences(6, 1, 6), (0.5, 0.0, 2.0), strict=True)]
    part = [replace(s, advantage=a) for s, a in zip(part, (1.0, 1.0, -1.0), strict=True)]
    logits = logits_of(13).double().requires_grad_()
    old = token_stats(logits.detach(), BATCHER.batch(part).targets).logp.float()
    old -= torch.tensor([0.6, 0.05, 0.0, -0.6, 0.1, -0.05]).repeat(3)[:13]
    sums, batch, out = sums_of(
        [replace(s, old_logp=o) for s, o in zip(part, old.split([6, 1, 6]), strict=True)],
        logits=logits,
        objective=objective,
        weighting=PolarityWeighting(strength=0.5, phase=-0.7),
    )
    out.loss.backward()
    rate = 1e-5
    moved = token_stats(logits.detach() - rate * logits.grad, batch.targets)
    change = ((moved.entropy - out.entropy) / rate).detach()[batch.token_weight > 0]
    assert sums.predicted == pytest.approx(change.sum().item(), rel=1e-3)
    assert change.abs().max() > 0.05


def test_the_prediction_is_over_all_tokens_and_not_the_first_micro_batchs() -> None:
    """Two micro-batches, the second of which weighs more and pulls the other way."""
    first, second = sequences(5, 5, 5, 5)[::2]
    first = replace(first, advantage=1.0, weight=0.02)
    second = replace(second, response_ids=first.response_ids, advantage=-1.0, weight=0.08)
    alone = run_update(bigram(), [first], size=1).sums.predicted
    both = run_update(bigram(), [first, second], size=1).sums.predicted
    assert abs(alone) > 1e-3
    assert both == pytest.approx(alone - 4 * alone, rel=1e-5)


# ---- ratios of sequences ------------------------------------------------------------------------


def test_the_ratio_of_a_completion_does_not_depend_on_its_mates() -> None:
    """In micro-batches of one or of all, by tokens whose advantage and ratio differ."""
    generator = torch.Generator().manual_seed(1)
    part = [
        replace(s, old_logp=torch.randn(len(s.response_ids), generator=generator) - 3)
        for s in weighted(4, 2, 3)
    ]
    objective = Objective(ratio_level="sequence", clip_low=1.0, clip_high=9.0)
    engines, done = [], []
    for size in (64, 1):
        engines.append(bigram())
        done.append(run_update(engines[-1], part, size=size, objective=objective))
    assert done[0].sums == pytest.approx(done[1].sums)
    torch.testing.assert_close(engines[0].table, engines[1].table, rtol=1e-5, atol=1e-7)
    table = bigram().table.detach()
    ratios = []
    for s in part:
        fed = torch.tensor([s.prompt_ids[-1], *s.response_ids[:-1]])
        logp = token_stats(table[fed], torch.tensor(s.response_ids)).logp
        ratios.append((logp - s.old_logp).mean().exp().item())
    lengths = [len(s.response_ids) for s in part]
    expected = sum(n * r for n, r in zip(lengths, ratios, strict=True))
    assert done[0].sums.ratio == pytest.approx(expected, rel=1e-5)


# ---- what is measured ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 10**9, 7])
def test_measured_is_the_change_of_the_mean_entropy_of_the_same_tokens(tokens: int) -> None:
    """In evaluation mode; of all tokens that train, whose entropy before is the update's own
    pass's, or of a sample."""
    part = [replace(s, weight=s.weight / 12) for s in sequences(4, 2, 3, 2, 5, 2)]
    engine = bigram()
    size = 2
    kept = [s for s in part if s.weight]
    if tokens == 7:  # of 12: 7/12 of three completions, rounded up, at equal distances
        kept = spread(kept, 7 / 12)
        assert [s.group for s in kept] == [0, 4]
    over = passes(engine, size)
    pieces = over.pieces(kept)
    before = over.mean_entropy(pieces)
    done, measurement = measured_update(engine, part, tokens, size=size)
    assert done.measured_delta is None
    engine.evaluated.clear()
    done = measurement.measure(done)
    assert engine.evaluated == [True] * (1 if tokens == 7 else 3)
    after = over.mean_entropy(pieces)
    assert done.measured_delta == pytest.approx(after - before, rel=1e-4)
    assert abs(after - before) > 1e-4


@pytest.mark.parametrize("tokens", [0, 7])
def test_weights_that_do_not_move_change_the_entropy_by_exactly_nothing(tokens: int) -> None:
    engine = bigram()
    done, measurement = measured_update(engine, weighted(4, 2, 3, 2), tokens, size=2, lr=0.0)
    assert measurement.measure(done).measured_delta == 0.0


@pytest.mark.parametrize("n", [1, 2, 7, 8, 64, 100])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.125, 0.5, 0.9, 1.0])
def test_a_sample_is_spread_over_all_of_the_batch(n: int, share: float) -> None:
    """Every run of micro-batches as long as the distance holds one of the sample."""
    part = [replace(s, group=i) for i, s in enumerate(sequences(*[1] * n))]
    chosen = [s.group for s in spread(part, share)]
    assert len(chosen) == math.ceil(share * n) == len(set(chosen))
    distance = n / len(chosen)
    edges = [-distance / 2, *chosen, n - 1 + distance / 2]
    assert all(b - a <= distance + 1 for a, b in itertools.pairwise(edges))
    assert spread([], share) == []


def test_a_sample_comes_from_every_micro_batch_and_never_the_first_alone() -> None:
    part = weighted(*[4] * 32)
    pieces = [part[i : i + 8] for i in range(0, 32, 8)]
    over = passes(bigram(), 8)
    measurement = EntropyMeasurement.of(over, pieces, tokens=32)
    (sampled,) = measurement.pieces
    assert [s.group // 8 for s in sampled] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert measurement.before == over.mean_entropy(measurement.pieces) > 0


def test_with_dropout_the_entropy_before_is_measured_without_it() -> None:
    engine, pieces = bigram(), [weighted(4, 4)]
    own = EntropyMeasurement.of(passes(engine), pieces, tokens=0)
    assert own.before is None
    engine.dropout = True
    measured = EntropyMeasurement.of(passes(engine), pieces, tokens=0)
    assert engine.evaluated == [True]
    assert measured.before == passes(engine).mean_entropy(pieces)


def test_the_mean_entropy_is_of_the_tokens_that_train() -> None:
    """Whatever the entropy of another is, NaN included; without one there is no mean."""
    nats = torch.tensor([0.25, 0.75, *[torch.nan] * 4])
    engine = SimpleNamespace(train=lambda mode: None, forward=lambda batch: (nats,) * 4)
    assert passes(engine).mean_entropy([sequences(2, 4)]) == 0.5
    nats = nats[2:]
    assert math.isnan(passes(engine).mean_entropy([sequences(2, 4)[1:]]))


def test_an_update_that_is_not_measured_has_no_change() -> None:
    done = Update(TokenSums(*[0.0] * 10), BranchSums(*[0.0] * 11), 0.0, 1e-3)
    assert done.applied and done.measured_delta is None
    skipped = replace(done, reason="loss is nan")
    assert not skipped.applied and EntropyMeasurement(passes(None), []).measure(skipped) is skipped


def test_an_update_that_is_skipped_is_neither_measured_nor_a_step_of_adamws() -> None:
    engine = bigram()
    bad = [replace(weighted(4)[0], advantage=math.inf)]
    done, measurement = measured_update(engine, bad)
    done = measurement.measure(done)
    assert done.reason and done.measured_delta is None
    assert not engine.adamw.state
