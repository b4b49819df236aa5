"""What PAPO claims, on problems small enough to know the truth.

Unit polarity predicts the entropy change of a step; and in a bandit where the baseline's entropy
collapses or explodes, the phase and the weights hold it in a band (requirement 19).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from papo.policy.advantage import group_advantages
from papo.policy.phase import PhaseController
from papo.policy.weighting import BranchSums, WeightController, branch_sums
from papo_kernels import policy_loss, token_stats

# Prediction of the entropy change


class Steps(NamedTuple):
    """One small policy-gradient step per row: what is known before it, and the entropy change."""

    advantages: Tensor
    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    change: Tensor


@pytest.fixture(scope="module")
def steps() -> Steps:
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary, rate = 4000, 50, 1e-4
    spread = 0.5 + 4.0 * torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    logits = spread * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    p = logits.softmax(1)
    targets = torch.multinomial(p, 1, generator=generator).squeeze(1)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    before = token_stats(logits, targets)
    direction = torch.nn.functional.one_hot(targets, vocabulary) - p
    after = token_stats(logits + rate * advantages[:, None] * direction, targets)
    change = (after.entropy - before.entropy) / rate
    return Steps(advantages, before.logp, before.entropy, before.unit_polarity, change)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def sign_agreement(a: Tensor, b: Tensor) -> float:
    return float((a.sign() == b.sign()).double().mean())


def test_unit_polarity_predicts_the_entropy_change(steps):
    predicted = steps.advantages * steps.unit_polarity
    assert correlation(predicted, steps.change) > 0.9999
    assert sign_agreement(predicted, steps.change) > 0.999


@pytest.mark.parametrize("rival", ["steer", "single logit", "covariance"])
def test_other_scores_mistake_the_direction_of_many_tokens(steps, rival):
    """STEER (arXiv 2510.10150, released code, signed), the sampled logit alone (arXiv 2602.03392)
    and Clip-Cov's covariance (arXiv 2505.22617)."""
    advantages, logp, entropy, _, change = steps
    p = logp.exp()
    predicted = {
        "steer": -advantages * p * (1 - p) * (logp + entropy),
        "single logit": -advantages * p * (logp + entropy),
        "covariance": -(advantages - advantages.mean()) * (logp - logp.mean()),
    }[rival]
    assert 0.0 < correlation(predicted, change) < 0.9
    assert 0.5 < sign_agreement(predicted, change) < 0.95


# The bandit


class Bandit(NamedTuple):
    """Arms' mean rewards, the policy's logits at the start and the size of a step."""

    means: Tensor
    logits: Tensor
    rate: float
    target: float | str


def many_good_arms() -> Bandit:
    """10 of 50 arms are equally good: sampling noise picks among them, and entropy collapses."""
    means = torch.zeros(50)
    means[:10] = 1.0
    return Bandit(means, torch.zeros(50), rate=0.5, target=2.0)


def comfortable_start() -> Bandit:
    """3 arms are preferred, all others are a little better: entropy grows until it is uniform."""
    means, logits = torch.ones(50), torch.zeros(50)
    means[:3] = 0.8
    logits[:3] = 4.0
    return Bandit(means, logits, rate=0.3, target="warmup")


class Trajectory(NamedTuple):
    """Entropy of each step's policy, and the last policy's expected reward."""

    entropy: list[float]
    reward: float


def train(
    bandit: Bandit, *, strength: float, seed: int, steps: int, samples: int = 64
) -> Trajectory:
    """GRPO with PAPO's weights, in the trainer's order: weights come from the steps before."""
    generator = torch.Generator().manual_seed(seed)
    phase = PhaseController(
        SimpleNamespace(
            mode="both",
            target=bandit.target,
            warmup_steps=5,
            fast_decay=0.7,
            slow_decay=0.95,
            k_d=3.0,
            k_p=3.0,
        )
    )
    weights = WeightController(
        SimpleNamespace(
            strength=strength, shape="sign", dead_zone=1e-6, conserve=True, sigma_decay=0.95
        )
    )
    logits = bandit.logits.clone()
    live = torch.ones(samples, dtype=torch.bool)
    entropies = []
    for _ in range(steps):
        arms = torch.multinomial(logits.softmax(0), samples, replacement=True, generator=generator)
        rewards = bandit.means[arms] + 0.5 * torch.randn(samples, generator=generator)
        advantages = group_advantages(rewards[None], normalize_std=True).advantages[0]
        leaf = logits.clone().requires_grad_()
        out = policy_loss(
            leaf.expand(samples, -1).contiguous(),
            arms,
            advantages,
            torch.full((samples,), 1.0 / samples),
            weighting=weights.kernel_weighting(phase.phase),
        )
        out.loss.backward()
        logits = logits - bandit.rate * leaf.grad
        entropies.append(out.entropy.mean().item())
        h = weights.shape_of(out.polarity, out.unit_polarity)
        sums = branch_sums(out.polarity, advantages, out.weight, live, out.clipped, h)
        phase.update(entropies[-1])
        weights.update(BranchSums.from_tensor(sums))
    return Trajectory(entropies, float(logits.softmax(0) @ bandit.means))


SEEDS = [0, 1, 2]


@pytest.mark.parametrize("seed", SEEDS)
def test_entropy_collapse_is_held_off(seed):
    """Requirement 19: GRPO settles on few of ten equally good arms, PAPO stays near its target."""
    grpo = train(many_good_arms(), strength=0.0, seed=seed, steps=350)
    papo = train(many_good_arms(), strength=0.5, seed=seed, steps=350)
    assert grpo.entropy[-1] < 0.5 * many_good_arms().target
    late = [entropy / many_good_arms().target for entropy in papo.entropy[-150:]]
    assert min(late) > 0.75 and max(late) < 1.25
    assert papo.reward > 0.9  # 0.2 at the start


@pytest.mark.parametrize("seed", SEEDS)
def test_entropy_explosion_is_held_off(seed):
    """Requirement 19, the other direction: PAPO stays within a quarter of where it began."""
    grpo = train(comfortable_start(), strength=0.0, seed=seed, steps=300)
    papo = train(comfortable_start(), strength=0.5, seed=seed, steps=300)
    assert grpo.entropy[-1] > 0.9 * math.log(50)
    start = sum(papo.entropy[:5]) / 5
    assert min(papo.entropy) > 0.75 * start and max(papo.entropy) < 1.25 * start


def test_warm_up_is_the_baseline_bit_for_bit():
    grpo = train(many_good_arms(), strength=0.0, seed=0, steps=6)
    papo = train(many_good_arms(), strength=0.5, seed=0, steps=6)
    assert grpo.entropy[:5] == papo.entropy[:5]
