"""top_p and top_k: what is trained is the distribution that was sampled."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from papo.config import AdvantageConfig, LossConfig
from papo.policy.advantage import score_groups
from papo.policy.batch import IDLE, MicroBatch, collate
from papo.policy.module import Policy
from papo.policy.passes import loss_of, stats_of
from papo.rollout import HFSampler, SamplingParams
from papo.train.experience import to_sequences, with_token_weights
from papo.types import Problem, Reward
from papo_kernels import Compute, Objective, PolarityWeighting, policy_loss, token_stats
from tests.trainer.families import token_logits
from tests.trainer.tiny import small_llama

V, EOS, TEMPERATURE = 60, 0, 1.3
CUTS = [{"top_k": 4}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8}]


def sampled(cut: dict[str, float]) -> tuple[Policy, MicroBatch, MicroBatch]:
    """A float32 policy, and what it sampled with `cut`, in shared rows and in rows apart."""
    model = small_llama(3, vocab_size=V, eos_token_id=EOS, pad_token_id=EOS).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    problems = [Problem(0, (), "", {}, (5, 6, 7)), Problem(1, (), "", {}, (8,))]
    sampler = HFSampler(SimpleNamespace(decode=lambda ids, **_: str(ids)), [EOS], EOS)
    params = SamplingParams(10, TEMPERATURE, **cut)
    completions = sampler.sample(model, problems, 4, params, [1, 2])
    rewards = [Reward(float(i % 3 == 0), "ok") for i in range(len(completions))]
    groups = score_groups(completions, rewards, range(2), AdvantageConfig(), 10)
    sequences = with_token_weights(to_sequences(groups), LossConfig())
    policy = Policy(model, temperature=TEMPERATURE)
    shared, apart = (collate(sequences, pad_id=EOS, max_row_tokens=n) for n in (2048, 0))
    return policy, shared, apart


def engine_of(policy: Policy) -> SimpleNamespace:
    return SimpleNamespace(forward=policy)


def masked_logits(policy: Policy, batch: MicroBatch) -> torch.Tensor:
    """float64 [N, V] of the model itself on rows apart, -inf where the sampler's filter cut."""
    logits = token_logits(policy.causal_lm, batch).double()
    assert batch.keep_offsets is not None and batch.keep_ids is not None
    kept = torch.zeros_like(logits, dtype=torch.bool)
    rows = torch.repeat_interleave(torch.arange(len(logits)), batch.keep_offsets.diff())
    kept[rows, batch.keep_ids] = True
    return logits.masked_fill(~kept, -torch.inf)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_trained_log_probs_are_those_of_the_sampler(cut) -> None:
    policy, batch, apart = sampled(cut)
    stats = stats_of(engine_of(policy), batch)
    assert torch.allclose(stats.logp, batch.sampler_logp, atol=2e-5)
    with torch.no_grad():
        logits = masked_logits(policy, apart)
    expected = token_stats(
        logits, batch.targets, temperature=TEMPERATURE, compute=Compute("reference")
    )
    for name in ("logp", "entropy", "unit_polarity"):
        got, want = getattr(stats, name).double(), getattr(expected, name)
        assert torch.allclose(got, want, atol=2e-5), name


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_loss_and_its_gradient_are_those_of_the_sampled_distribution(cut) -> None:
    policy, batch, apart = sampled(cut)
    weighting = PolarityWeighting(strength=0.5, phase=0.4)
    objective = Objective(entropy_coef=0.01)
    out = loss_of(engine_of(policy), batch, objective, weighting)
    out.loss.backward()
    names = [name for name, _ in policy.named_parameters()]
    got = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    expected = policy_loss(
        masked_logits(policy, apart),
        batch.targets,
        batch.advantages.double(),
        batch.token_weight.double(),
        objective=objective,
        weighting=weighting,
        temperature=TEMPERATURE,
        compute=Compute("reference"),
    )
    expected.loss.backward()
    assert torch.allclose(out.loss.double(), expected.loss, atol=1e-6)
    for name, grad, parameter in zip(names, got, policy.parameters(), strict=True):
        assert parameter.grad is not None
        scale = parameter.grad.abs().max()
        assert (grad - parameter.grad).abs().max() <= 1e-4 * scale + 1e-8, name


def test_an_idle_rank_takes_part_in_a_loss_over_kept_ids() -> None:
    policy, batch, _ = sampled({"top_k": 4})
    idle = collate([IDLE], pad_id=EOS, max_row_tokens=2048)
    assert batch.keep_offsets is not None and idle.keep_offsets is not None
    out = loss_of(engine_of(policy), idle, Objective(), None)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert all(not p.grad.any() for p in policy.parameters() if p.grad is not None)
