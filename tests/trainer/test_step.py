"""The parts of an update that need no engine: the probe's choice of tokens, its two figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from papo import step
from papo.batch import TrainingSequence, collate
from papo.step import Probe, TokenSums, Update
from papo.weighting import BranchSums
from papo_kernels import PolarityWeighting, PolicyLossParams, TokenStats, policy_loss, token_stats

V = 13


def sequences(*lengths: int) -> list[TrainingSequence]:
    """Completions of these lengths, every second one without weight."""
    return [
        TrainingSequence(
            (1, 2), tuple(range(n)), (0.0,) * n, (-1.0) ** (i // 2), float((i + 1) % 2), i
        )
        for i, n in enumerate(lengths)
    ]


def make_batch(part: Any) -> Any:
    return collate(part, pad_id=0, max_row_tokens=0)


def logits_of(n: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))


def probe_of(part: list[TrainingSequence], tokens: int, **loss: Any) -> tuple[Probe, Any]:
    """The probe of a micro-batch of `part` with made-up logits, and the loss's output."""
    batch = make_batch(part)
    out = policy_loss(
        logits_of(len(batch.targets)), batch.targets, batch.advantages, batch.token_weight, **loss
    )
    return Probe.of(part, batch, out, tokens), out


@pytest.mark.parametrize(("tokens", "kept"), [(1, 1), (3, 1), (4, 2), (8, 3), (9, 3), (10**9, 3)])
def test_the_probe_takes_whole_completions_up_to_the_tokens_asked_for(
    tokens: int, kept: int
) -> None:
    part = sequences(3, 2, 3)
    probe, out = probe_of(part, tokens)
    n = sum(len(s.response_ids) for s in part[:kept])
    assert list(probe.sequences) == part[:kept]
    assert len(probe.live) == len(probe.entropy) == len(probe.predicted) == n
    assert torch.equal(probe.entropy, out.entropy[:n])
    assert probe.live.tolist() == [True] * 3 + [False] * (n - 3) if kept < 3 else True


def test_what_is_predicted_is_weighted_polarity_and_nothing_where_it_is_clipped() -> None:
    part = sequences(4, 4, 4)
    batch = make_batch(part)
    logp = token_stats(logits_of(12), batch.targets).logp
    old = logp - torch.tensor([0.6, 0.05, -0.6]).repeat(4)  # ratios: 1.8, 1.05, 0.55
    probe, out = probe_of(
        part, 10**9, old_logp=old, weighting=PolarityWeighting(strength=0.5, phase=1.0)
    )
    live = batch.token_weight > 0
    assert out.clipped[live].any() and not out.clipped[live].all()
    assert set(out.weight[live].tolist()) == {0.5, 1.5}
    expected = torch.where(out.clipped, 0.0, out.weight * out.ratio * batch.advantages)
    torch.testing.assert_close(probe.predicted, expected * out.unit_polarity)
    assert probe.predicted[live & ~out.clipped].abs().min() > 0


def test_both_changes_are_means_over_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entropy is measured in evaluation mode, on the probe's own completions."""
    part = sequences(3, 2, 3)
    probe, out = probe_of(part, 10**9)
    after = token_stats(logits_of(8, seed=1), make_batch(part).targets)
    modes: list[bool] = []

    def stats_of(engine: Any, batch: Any) -> TokenStats:
        assert modes == [False] and len(batch.targets) == 8
        return after

    monkeypatch.setattr(step, "stats_of", stats_of)
    engine = SimpleNamespace(train=modes.append)
    predicted, measured = probe.deltas(engine, make_batch)
    live = torch.tensor([True] * 3 + [False] * 2 + [True] * 3)
    change = (after.entropy - out.entropy)[live].double()
    assert measured == pytest.approx(change.mean().item())
    assert predicted == pytest.approx(out.polarity[live].double().mean().item())
    assert modes == [False, True]


def test_without_a_live_token_both_changes_are_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the entropy of a token that does not train became, NaN included."""
    probe, _ = probe_of(sequences(1, 4), 10**9)
    probe = Probe(probe.sequences, torch.zeros(5, dtype=torch.bool), probe.entropy, probe.predicted)
    stats = TokenStats(*[torch.full((5,), torch.nan)] * 4)
    monkeypatch.setattr(step, "stats_of", lambda engine, batch: stats)
    engine = SimpleNamespace(train=lambda mode: None)
    assert probe.deltas(engine, make_batch) == (0.0, 0.0)


def test_an_update_without_a_probe_measures_nothing() -> None:
    done = Update(TokenSums(*[0.0] * 8), BranchSums(*[0.0] * 11), 0.0, "", None)
    assert done.measured(None, make_batch) is done and done.applied
    assert not Update(done.sums, done.branches, 0.0, "loss is nan", None).applied


def test_the_prediction_is_the_entropy_change_of_a_step_in_logit_space() -> None:
    """Where every token has logits of its own (no shared weights), a small step along the loss's
    gradient changes the entropy by exactly what the probe predicts, to first order.
    """
    part = sequences(6, 1, 6)
    batch = make_batch(part)
    logits = logits_of(13).double().requires_grad_()
    options = {
        "params": PolicyLossParams(),
        "weighting": PolarityWeighting(strength=0.5, phase=-0.7),
    }
    out = policy_loss(logits, batch.targets, batch.advantages, batch.token_weight, **options)
    out.loss.backward()
    probe = Probe.of(part, batch, out, 10**9)
    rate = 1e-5
    moved = token_stats(logits.detach() - rate * logits.grad, batch.targets)
    change = (moved.entropy - out.entropy)[probe.live] / rate
    torch.testing.assert_close(change, probe.predicted[probe.live], rtol=1e-3, atol=1e-6)
    assert change.abs().max() > 0.05
