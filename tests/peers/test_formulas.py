"""Surrogates and KL estimators against the functions of peers, value and gradient, in float64.

CE-GPPO is in none of these peers, and stands beside its paper's formula.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from papo_kernels import LogProbs, Objective, PolarityWeighting, TokenWeights, policy_loss

MASK = torch.ones(6, 9, dtype=torch.float64)
MASK[1, 4:], MASK[3, 7:], MASK[5, ::2] = 0.0, 0.0, 0.0


def _tokens() -> SimpleNamespace:
    """Log-probs, ratios on both sides of each bound, and advantages of both signs and 0."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logp = -normal(6, 9).abs() * 1.5 - 0.05
    # Both are log-probs: no ratio takes one above 0.
    old = (logp + 0.6 * normal(6, 9)).clamp(max=-0.01)
    advantages = normal(6)
    advantages[2] = 0.0
    ref, unit_polarity = logp + 0.5 * normal(6, 9), 0.3 * normal(6, 9)
    return SimpleNamespace(
        logp=logp, old=old, ref=ref, advantages=advantages, unit_polarity=unit_polarity
    )


def _agree(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]) -> None:
    """The same loss, and the same gradient by the log-probs."""
    results = []
    for loss in (ours, theirs):
        logp = _tokens().logp.requires_grad_()
        value = loss(logp)
        (grad,) = torch.autograd.grad(value.sum(), logp)
        results.append((value.detach(), grad))
    for mine, peers in zip(*results, strict=True):
        assert peers.abs().max() > 1e-3
        # Rounding; dppo's divergence and k3 cancel a few bits.
        torch.testing.assert_close(mine, peers, rtol=1e-10, atol=1e-13)


WEIGHTINGS = {
    "sign": PolarityWeighting(0.5, 0.8, scale=1.1),
    "tanh": PolarityWeighting(0.5, -0.8, "tanh", sigma=0.3),
}


def _weighted(
    logp: Tensor, objective: Objective, weighting: PolarityWeighting | None, token_weight: Tensor
) -> Tensor:
    """The loss with polarity weighting."""
    t = _tokens()
    return policy_loss(
        LogProbs(logp, unit_polarity=t.unit_polarity),
        torch.zeros(MASK.shape, dtype=torch.int64),
        t.advantages,
        token_weight,
        old_logp=t.old,
        objective=objective,
        weighting=weighting,
    ).loss


def _weighted_advantages(
    logp: Tensor, weighting: PolarityWeighting | None, by_sequence: bool = False
) -> Tensor:
    """w A by its definition, for a loss that knows no weighting."""
    t = _tokens()
    advantages = t.advantages[:, None].expand_as(MASK)
    if weighting is None:
        return advantages
    log_ratio = logp.detach() - t.old
    if by_sequence:
        log_ratio = (log_ratio * MASK).sum(-1, keepdim=True) / MASK.sum(-1, keepdim=True)
    polarity = log_ratio.exp() * advantages * t.unit_polarity
    h = polarity.sign() if weighting.shape == "sign" else (polarity / weighting.sigma).tanh()
    return weighting.scale * (1.0 + weighting.strength * weighting.phase * h) * advantages


@pytest.mark.parametrize("weighting", [None, *WEIGHTINGS.values()], ids=["none", *WEIGHTINGS])
def test_ce_gppo(weighting: PolarityWeighting | None) -> None:
    low, high, beta_1, beta_2 = 0.1, 0.25, 0.6, 0.9
    objective = Objective(low, high, surrogate="ce_gppo", gppo_scale=(beta_1, beta_2))
    old = _tokens().old

    def paper(logp: Tensor) -> Tensor:
        """Equation of 2509.20712, with its names of the scales."""
        delta, advantage = (logp - old).exp(), _weighted_advantages(logp, weighting)
        below, above = delta < 1 - low, delta > 1 + high
        kept = delta / delta.detach()
        value = delta * advantage
        value = torch.where(below & (advantage < 0), beta_1 * (1 - low) * kept * advantage, value)
        value = torch.where(above & (advantage > 0), beta_2 * (1 + high) * kept * advantage, value)
        return -(value * MASK).sum() / MASK.sum()

    _agree(lambda logp: _weighted(logp, objective, weighting, MASK / MASK.sum()), paper)


VERL = {
    "clip": "vanilla",
    "gspo": "gspo",
    "cispo": "cispo",
    "sapo": "sapo",
    "dppo_tv": "dppo_tv",
    "dppo_kl": "dppo_kl",
}


def _verl_config() -> Any:
    from verl.workers.config import ActorConfig

    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.1,
        clip_ratio_high=0.25,
        clip_ratio_c=1.6,
    )


@pytest.mark.needs("verl")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("surrogate", VERL)
def test_verl_surrogates(surrogate: str, weighted: bool) -> None:
    from verl.trainer.ppo import core_algos

    from tests.peers.shims.verl import policy_loss_of

    t, config = _tokens(), _verl_config()
    sampler = (t.old - t.ref).exp() if weighted else None
    advantages = t.advantages[:, None].expand_as(MASK)
    metrics = []

    def of(loss: Callable[..., tuple[Tensor, dict[str, float]]]) -> Callable[[Tensor], Tensor]:
        def run(logp: Tensor) -> Tensor:
            value, figures = loss(t.old, logp, advantages, MASK, "token-mean", config, sampler)
            metrics.append(figures)
            return value

        return run

    _agree(
        of(policy_loss_of(surrogate)),
        of(getattr(core_algos, f"compute_policy_loss_{VERL[surrogate]}")),
    )
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)


@pytest.mark.needs("verl")
@pytest.mark.parametrize("shape", WEIGHTINGS)
@pytest.mark.parametrize("surrogate", VERL)
def test_weighted_verl_surrogates(surrogate: str, shape: str) -> None:
    from verl.trainer.ppo import core_algos

    from tests.peers.shims.verl import objective_of

    config, weighting = _verl_config(), WEIGHTINGS[shape]
    objective = objective_of(surrogate, config)
    peer = getattr(core_algos, f"compute_policy_loss_{VERL[surrogate]}")
    mode = "seq-mean-token-mean" if surrogate == "sapo" else "token-mean"

    def ours(logp: Tensor) -> Tensor:
        loss = _weighted(logp, objective, weighting, MASK)
        return core_algos.agg_loss(loss, MASK, mode, **config.global_batch_info)

    def theirs(logp: Tensor) -> Tensor:
        advantages = _weighted_advantages(logp, weighting, by_sequence=surrogate == "gspo")
        return peer(_tokens().old, logp, advantages, MASK, "token-mean", config, None)[0]

    _agree(ours, theirs)


@pytest.mark.needs("verl")
@pytest.mark.parametrize("name", ["k1", "k1+", "abs", "abs+", "k2", "k3", "k3+"])
def test_verl_kl_estimators(name: str) -> None:
    from verl.trainer.ppo import core_algos

    from tests.peers.shims import verl

    ref = _tokens().ref
    _agree(
        lambda logp: verl.kl_penalty(logp, ref, name),
        lambda logp: core_algos.kl_penalty(logp, ref, name),
    )


LIGER = {
    "clip": dict(loss_type="dapo"),
    "two-sided": dict(loss_type="dapo", delta=1.6),
    "cispo": dict(loss_type="cispo", epsilon_high=1.3),
    "cispo below 1": dict(loss_type="cispo", epsilon_high=0.9),
    "sapo": dict(loss_type="sapo"),
    "sequence": dict(loss_type="grpo", importance_sampling_level="sequence"),
}


@pytest.mark.needs("liger-kernel")
@pytest.mark.parametrize("kl_ratio", [False, True], ids=["kl", "kl times ratio"])
@pytest.mark.parametrize("case", LIGER)
def test_liger_surrogates(case: str, kl_ratio: bool) -> None:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    from tests.peers.shims import liger

    t = _tokens()
    options = dict(
        importance_sampling_level="token",
        epsilon_low=0.1,
        epsilon_high=0.25,
        sapo_temperature_pos=1.2,
        sapo_temperature_neg=0.8,
        delta=None,
        beta=0.3,
        use_bias_correction_kl=kl_ratio,
        vllm_is_ratio=None,
        num_items_in_batch=None,
    )
    options.update(LIGER[case])
    figures = []

    def ours(logp: Tensor) -> Tensor:
        o = SimpleNamespace(
            **options,
            advantages=t.advantages,
            old_logp=t.old,
            ref_logp=t.ref,
            mask=MASK,
            temperature=1.0,
        )
        ids = torch.zeros(MASK.shape, dtype=torch.int64)
        weights: TokenWeights = liger.weights_of(o)
        out, kl, clipped = liger.grpo_loss(LogProbs(logp), ids, o, weights, reduce=True)
        figures.append([(kl * MASK).sum() / MASK.sum(), (clipped * MASK).sum() / MASK.sum()])
        return out.loss

    def theirs(logp: Tensor) -> Tensor:
        loss, metrics = LigerFusedLinearGRPOFunction.ppo_loss_fn(
            logp, MASK, t.advantages, MASK, t.ref, t.old, **options
        )
        figures.append(metrics)
        return loss

    _agree(ours, theirs)
    for mine, peers in zip(*figures, strict=True):
        torch.testing.assert_close(mine, peers.to(mine.dtype), rtol=1e-6, atol=0)


@pytest.mark.needs("openrlhf")
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("dual_clip", [None, 1.6])
def test_openrlhf_surrogates(kind: str, dual_clip: float | None) -> None:
    from tests.peers.shims import openrlhf as shim

    t = _tokens()
    loss = shim.PolicyLoss(0.1, 0.25, dual_clip, policy_loss_type=kind)
    arguments = t.old, t.advantages[:, None].expand_as(MASK), MASK
    _agree(
        lambda logp: shim.policy_loss_forward(loss, logp, *arguments)[0],
        lambda logp: loss(logp, *arguments)[0],
    )


@pytest.mark.needs("openrlhf")
@pytest.mark.parametrize("shape", WEIGHTINGS)
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_weighted_openrlhf_surrogates(kind: str, shape: str) -> None:
    from tests.peers.shims import openrlhf as shim

    weighting, by_sequence = WEIGHTINGS[shape], kind == "gspo"
    level = "sequence" if by_sequence else "token"
    objective = Objective(0.1, 0.25, 1.6, ratio_level=level, reduce=False)
    peer = shim.PolicyLoss(0.1, 0.25, 1.6, policy_loss_type=kind)

    def ours(logp: Tensor) -> Tensor:
        loss = _weighted(logp, objective, weighting, MASK)
        return shim.aggregate_loss(loss, MASK, peer.token_level_loss)

    def theirs(logp: Tensor) -> Tensor:
        advantages = _weighted_advantages(logp, weighting, by_sequence)
        return peer(logp, _tokens().old, advantages, MASK)[0]

    _agree(ours, theirs)


@pytest.mark.needs("openrlhf")
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_openrlhf_kl_estimators(name: str, unbiased: bool) -> None:
    from tests.peers.shims import openrlhf as shim

    ref = _tokens().ref.float()  # it computes in float32
    results = []
    for estimate in (shim.compute_approx_kl, shim.utils.compute_approx_kl):
        logp = _tokens().logp.float().requires_grad_()
        value = estimate(logp, ref, kl_estimator=name, unbiased_gradient=unbiased)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), logp)))
    for mine, peers in zip(*results, strict=True):
        # k3 of small differences cancels: expm1 has the digits, exp(x) - 1 has not.
        torch.testing.assert_close(mine, peers, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trl_half_precision(dtype: torch.dtype) -> None:
    """Why TRL's tests of half-precision logits are exceptions: a result here is the exact one,
    rounded once, and what they compare it with is not."""
    from tests.peers.shims import trl

    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(4, 32, 1024, generator=generator).to(dtype)
    ids = torch.randint(1024, (4, 32), generator=generator)
    results = []
    for logp in (logits.log_softmax(-1), logits.double().log_softmax(-1)):
        results.append((logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)))
    ours = trl.selective_log_softmax(logits, ids), trl.entropy_from_logits(logits)
    # Half a unit in the last place, and what float32 adds to it.
    rounding = 0.51 * torch.finfo(dtype).eps
    for mine, theirs, exact in zip(ours, *results, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), exact, rtol=rounding, atol=0)
        assert ((theirs.double() - exact).abs() > rounding * exact.abs()).any()


@pytest.mark.needs("trl")
@pytest.mark.parametrize("options", [(), (4.0, 0.7)], ids=["plain", "softcap and scale"])
def test_trl_chunked_log_probs(options: tuple[float, ...]) -> None:
    from trl.kernels import ChunkedLogProbFunction

    from tests.peers.shims import trl

    generator = torch.Generator().manual_seed(7)
    shapes, ids = ((12, 16), (50, 16), (50,)), torch.randint(50, (12,), generator=generator)
    inputs = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]
    upstream = torch.randn(2, 12, generator=generator)
    results = []
    for function in (trl.chunked_log_prob, ChunkedLogProbFunction.apply):
        outputs = function(*inputs, ids, 0.8, 16, *options)
        grads = torch.autograd.grad(outputs[:2], inputs, list(upstream))
        results.append((*(x.detach() for x in outputs), *grads))
    for mine, peers in zip(*results, strict=True):
        torch.testing.assert_close(mine, peers, rtol=1e-5, atol=2e-6)
