"""Weights from shared polarity, on engines that need no DeepSpeed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from papo.config import OptimConfig, WeightingConfig
from papo.dist import collectives
from papo.dist.adamw import GuardedAdamW
from papo.policy.batch import Batcher, TrainingSequence
from papo.policy.module import Policy
from papo.policy.weighting import WeightController, branch_sums
from papo.train import stats
from papo.train.entropy import EntropyGradient
from papo.train.stats import Passes, attach
from papo.train.step import Updater
from papo.types import KeptIds
from papo_kernels import Objective, policy_loss, token_stats
from papo_kernels.token_loss import polarity_shape
from tests.trainer.bigram import BATCHER, PlainEngine, PolicyEngine, passes
from tests.trainer.ranks import on_ranks
from tests.trainer.tiny import small_llama


class MovingEngine(PlainEngine):
    """With weights that move along the average of the gradients.

    Attributes:
        change: of the last move.
    """

    computes_in_bf16 = False

    def direction(self) -> list[Tensor]:
        """The average, scaled as AdamW scales a step; as it is before AdamW's first update."""
        state = [self.adamw.state.get(p, {}) for p in self.parameters]
        beta, eps = self._optim.betas[1], self._optim.eps
        return [
            a / ((s["exp_avg_sq"] / (1 - beta ** float(s["step"]))).sqrt() + eps) if s else a
            for a, s in zip(self.average, state, strict=True)
        ]

    def slope(self) -> float:
        """Product of the average with that direction."""
        pairs = zip(self.average, self.direction(), strict=True)
        return sum(float((a * d).sum()) for a, d in pairs)

    @contextlib.contextmanager
    def moved_along_average(self, change: float) -> Iterator[None]:
        self.change = change
        kept = [p.detach().clone() for p in self.parameters]
        step = change / self.slope()
        with torch.no_grad():
            for p, d in zip(self.parameters, self.direction(), strict=True):
                p.add_(d, alpha=step)
            yield
            for p, k in zip(self.parameters, kept, strict=True):
                p.copy_(k)


class MovingPolicy(MovingEngine, PolicyEngine):
    """A transformers model."""


class TiedStates(MovingEngine):
    """A token's logits are the constant row of the token before it, plus one trained row that all
    states share.

    Attributes:
        evaluated: mode of each pass, True in evaluation.
    """

    dropout = False

    def __init__(self, rows: Tensor, **optim: Any) -> None:
        self.rows, self.shared = rows, torch.zeros(rows.shape[1], requires_grad=True)
        self.evaluated: list[bool] = []
        self._evaluating = False
        super().__init__(OptimConfig(**optim), [self.shared])

    def train(self, mode: bool = True) -> None:
        self._evaluating = not mode

    def forward(
        self,
        batch: Any,
        tokens: Any = None,
        objective: Any = None,
        weighting: Any = None,
    ) -> Any:
        self.evaluated.append(self._evaluating)
        ids = batch["input_ids"].flatten()[batch["logit_index"]]
        logits, targets = self.rows[ids] + self.shared, batch["targets"]
        if tokens is None:
            return token_stats(logits, targets)
        return policy_loss(logits, targets, **tokens, objective=objective, weighting=weighting)


def controller(**options: Any) -> WeightController:
    return WeightController(WeightingConfig(source="rollout", **options))


# ---- what it is ---------------------------------------------------------------------------------

V = 30


def llama_sequences() -> list[TrainingSequence]:
    """Completions of two prompts, the first two in a shared row, each token drawn from five ids."""
    g = torch.Generator().manual_seed(0)
    part = []
    for group, prompt, length in ((0, (3, 4, 5), 4), (0, (3, 4, 5), 3), (1, (6,), 5)):
        kept = torch.stack([torch.randperm(V, generator=g)[:5] for _ in range(length)])
        kept = kept.sort(dim=1).values
        chosen = torch.randint(5, (length, 1), generator=g)
        response = tuple(kept.gather(1, chosen).flatten().tolist())
        ids = KeptIds(torch.full((length,), 5), kept.flatten().to(torch.int32))
        advantage = 1.0 if length > 3 else -1.0
        part.append(
            TrainingSequence(prompt, response, (0.0,) * length, advantage, 1 / 12, group, kept=ids)
        )
    return part


@pytest.mark.parametrize("updates", [0, 2])
def test_shared_unit_polarity_is_the_tokens_part_of_the_mean_entropys_change(
    updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """<grad logp, P grad mean H> / <grad mean H, P grad mean H> by autograd, before AdamW's first
    update (P = 1) and after two.

    A one-sided difference is off by a multiple of its step, which twice the one at half the step
    takes away again: what stays is of the order of the step's square, 1.6e-5 times third
    derivatives of order 10. The model's norms compute in float32, which puts log-probs off by about
    2e-7: 2e-7 (4 / 0.002 + 2 / 0.004) = 5e-4.
    """
    model = small_llama(0, vocab_size=V).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # away from uniform rows, whose entropy has no gradient
    engine = MovingPolicy(OptimConfig(eps=1e-6), Policy(model, temperature=1.0))
    over = Passes(engine, Batcher(0, 2048, torch.device("cpu")), 8)
    part = llama_sequences()
    gradient = EntropyGradient(engine, over, share=1.0, decay=0.5)
    for _ in range(updates):
        gradient.take(part)
        Updater(engine, over.batcher, Objective(), controller()).update([part], None, 1e-2)
    gradient.take(part)
    batch = over.batcher.batch(part)
    logp = engine.forward(batch.model_inputs())[0]
    exact = []
    for each in logp:
        rows = torch.autograd.grad(each, engine.parameters, retain_graph=True, allow_unused=True)
        pairs = zip(rows, engine.direction(), strict=True)
        exact.append(sum(float((r * d).sum()) for r, d in pairs if r is not None) / engine.slope())
    differences = []
    weights = [p.detach().clone() for p in engine.parameters]
    for change in (0.004, 0.002):
        monkeypatch.setattr(stats, "SHARED_CHANGE", change)
        differences.append(torch.cat(over.shared_unit_polarity(part, over.token_stats(part))))
    whole, half = differences
    want = torch.tensor(exact, dtype=torch.float64)
    assert want.min() < -0.3 and want.max() > 0.3
    torch.testing.assert_close(2 * half - whole, want, rtol=0, atol=1e-3)
    assert all(map(torch.equal, engine.parameters, weights))


# ---- why it is ----------------------------------------------------------------------------------

# After token 1 arm 0 has a probability of 0.7, after token 2 one of 0.1.
ROWS = torch.tensor([[0.0, 0.0], [0.85, 0.0], [0.0, 2.2]])


def arms() -> list[TrainingSequence]:
    """Both arms are right after token 1, and most completions are those after token 2, from which
    there is nothing to learn."""
    drawn = [(1, 0, 1.0), (1, 1, 1.0), *[(2, 1, 0.0)] * 6]
    return [
        TrainingSequence((state,), (arm,), (0.0,), advantage, 1 / 8, group)
        for group, (state, arm, advantage) in enumerate(drawn)
    ]


def entropy_change(phase: float, **weighting: Any) -> float:
    """Of the batch's mean entropy in nats, by one small step of plain gradient descent."""
    engine = TiedStates(ROWS, eps=1e3)
    over, weights = passes(engine), controller(**weighting)
    EntropyGradient(engine, over, share=1.0, decay=0.8).take(arms())
    before = over.mean_entropy([arms()])
    part = attach(arms(), over, None, weights, phase, updates_per_rollout=1)
    updater = Updater(engine, BATCHER, Objective(), weights)
    done = updater.update([part], weights.kernel_weighting(phase), lr=10.0)
    assert done.applied
    return over.mean_entropy([arms()]) - before


@pytest.mark.parametrize("phase", [1.0, -1.0])
def test_states_that_share_parameters_need_shared_polarity(phase: float) -> None:
    """To reinforce the rare arm expands its own state's entropy, and contracts the mean: the other
    state prefers that arm, and is met more often. Local weights push the mean entropy where the
    phase does not want it, shared ones where it does."""
    strength = {"strength": 0.9}
    assert phase * entropy_change(phase, **strength, polarity="shared") > 0
    assert phase * entropy_change(phase, **strength) < 0


# ---- what is made of it -------------------------------------------------------------------------


def with_average(**options: Any) -> tuple[TiedStates, Passes]:
    engine = TiedStates(ROWS, **options)
    over = passes(engine, 4)
    EntropyGradient(engine, over, share=1.0, decay=0.8).take(arms())
    engine.evaluated.clear()
    return engine, over


@pytest.mark.parametrize("shape", ["sign", "tanh"])
def test_weights_and_branches_are_of_the_shared_polarity(shape: str) -> None:
    engine, over = with_average()
    weights = controller(strength=0.5, shape=shape, polarity="shared")
    here = over.token_stats(arms())
    with engine.moved_along_average(stats.SHARED_CHANGE):
        moved = over.token_stats(arms())
    unit = torch.cat([m.logp - h.logp for m, h in zip(moved, here, strict=True)])
    unit /= stats.SHARED_CHANGE
    part = attach(arms(), over, None, weights, 0.7, updates_per_rollout=2)
    batch = BATCHER.batch(part)
    advantages = torch.tensor([s.advantage for s in arms()])
    h = polarity_shape(advantages * unit, unit, shape, weights.sigma, 1e-6)
    assert h[0] > 0 > h[1]
    torch.testing.assert_close(batch.unit_polarity, unit, rtol=0, atol=0)
    torch.testing.assert_close(batch.factor, 1 + 0.5 * 0.7 * h, rtol=1e-6, atol=0)
    torch.testing.assert_close(batch.advantages, advantages * batch.factor, rtol=0, atol=0)
    # What the second update's ratio is relative to is the policy where it stands.
    torch.testing.assert_close(batch.old_logp, torch.cat([s.logp for s in here]), rtol=0, atol=0)
    done = Updater(engine, BATCHER, Objective(), weights).update([part], None, lr=1e-2)
    live, clipped = torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)
    sums = branch_sums(advantages * unit, advantages, batch.factor, live, clipped, h)
    assert done.branches._asdict() == pytest.approx(collectives.sum_named(sums), rel=1e-6)


def test_passes_are_made_only_where_they_are_needed() -> None:
    """Two where weights are of shared polarity, one where of the local one, none with strength 0;
    in evaluation mode, and each in two micro-batches."""
    for options, count in (
        ({"polarity": "shared"}, 2),
        ({"polarity": "local"}, 1),
        ({"polarity": "shared", "strength": 0.0}, 0),
    ):
        engine, over = with_average()
        part = attach(arms(), over, None, controller(**options), 0.7, updates_per_rollout=1)
        assert engine.evaluated == [True] * 2 * count
        if not count:
            assert part == arms()


def test_polarity_is_local_where_that_is_asked_for_or_there_is_no_average() -> None:
    weights = controller(polarity="local")
    for over, chosen in ((with_average()[1], weights), (passes(TiedStates(ROWS)), None)):
        shared = controller(polarity="shared")
        part = attach(arms(), over, None, chosen or shared, 0.7, updates_per_rollout=1)
        for s, own in zip(part, over.token_stats(arms()), strict=True):
            assert s.unit_polarity is None
            expected = weights.rollout_weights(s.advantage, own.unit_polarity, 0.7)
            assert torch.equal(s.factor, expected)


@pytest.mark.parametrize("factor", [1.0, 0.01, 9.0])
@pytest.mark.parametrize(("in_bf16", "most"), [(False, 0.1), (True, 0.5)])
def test_weights_are_moved_by_no_more_than_a_third_of_the_entropy(
    monkeypatch: pytest.MonkeyPatch, in_bf16: bool, most: float, factor: float
) -> None:
    """Further where activations are rounded; less where log-probs would bend."""
    monkeypatch.setitem(globals(), "ROWS", factor * ROWS)
    engine, over = with_average()
    engine.computes_in_bf16 = in_bf16
    here = over.token_stats(arms())
    entropy = float(torch.cat([h.entropy for h in here]).double().mean())
    part = attach(arms(), over, None, controller(polarity="shared"), 0.7, updates_per_rollout=1)
    change = min(most, entropy / 3)
    assert engine.change == pytest.approx(change, rel=1e-12)
    with engine.moved_along_average(engine.change):
        moved = over.token_stats(arms())
    for s, m, h in zip(part, moved, here, strict=True):
        assert torch.equal(s.unit_polarity, (m.logp - h.logp) / engine.change)


def test_the_reference_policy_stays_where_it_is() -> None:
    _, over = with_average()
    reference = passes(TiedStates(2 * ROWS))
    options = controller(polarity="shared")
    part = attach(arms(), over, reference, options, 0.7, updates_per_rollout=1)
    expected = reference.token_stats(arms())
    assert all(torch.equal(s.ref_logp, e.logp) for s, e in zip(part, expected, strict=True))


def test_a_log_prob_of_minus_infinity_has_no_shared_polarity() -> None:
    rows = torch.nn.functional.pad(ROWS, (0, 1), value=-torch.inf)
    part = [*arms(), replace(arms()[0], response_ids=(2,))]
    engine = TiedStates(rows)
    over = passes(engine)
    EntropyGradient(engine, over, share=1.0, decay=0.8).take(arms())
    shared = attach(part, over, None, controller(polarity="shared"), 0.7, 1)
    assert shared[-1].unit_polarity.item() == 0.0 and shared[-1].factor.item() == 1.0


def test_a_rank_without_sequences_makes_the_same_passes() -> None:
    def work() -> list[bool]:
        engine, over = with_average()
        mine = arms() if collectives.rank() else []
        attached = attach(mine, over, None, controller(polarity="shared"), 0.7, 1)
        assert len(attached) == len(mine)
        return engine.evaluated

    idle, busy = on_ranks(2, work)
    assert idle == busy == [True] * 4


@pytest.mark.parametrize("updates", [0, 1, 20])
def test_a_gradient_is_divided_as_an_update_would_divide_it(updates: int) -> None:
    """Also where a weight has never had one, as the embedding of a token that is rare."""
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(8))
    adamw = GuardedAdamW([weight], lr=1.0, betas=(0.0, 0.999), weight_decay=0.0, fused=True)
    for _ in range(updates):
        weight.grad = torch.randn(8, generator=g) * (torch.arange(8) < 6)
        adamw.step()
    gradient = torch.randn(8, generator=g)
    second = adamw.state[weight]["exp_avg_sq"].clone() if updates else None
    divided = gradient / adamw.divisor(second, gradient, adamw.updates)
    before = weight.detach().clone()
    weight.grad = gradient.clone()
    adamw.step()
    torch.testing.assert_close(divided, before - weight.detach(), rtol=1e-5, atol=1e-6)
    assert float(divided.abs().max()) < 1.01 * math.sqrt(updates + 1)
