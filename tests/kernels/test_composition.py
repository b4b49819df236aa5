"""Losses composed of statistics: per token, per sequence, from log-probs, and in float16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from papo_kernels import (
    Compute,
    Head,
    Logits,
    LogProbs,
    LogRatio,
    Objective,
    PolarityWeighting,
    Sequences,
    TokenStats,
    TokenWeights,
    policy_loss,
    token_stats,
)
from papo_kernels.objective import KL_ESTIMATORS, SURROGATES

# A kernel's part in it, the statistics and their gradient, is tested on every backend elsewhere.
pytestmark = pytest.mark.plumbing

B, T, V = 3, 5, 9
WEIGHTING = PolarityWeighting(0.4, 0.7, shape="tanh")


def batch(device="cpu", dtype=torch.float64, seed=0):
    """Logits, targets with ignored ones, and what the loss takes beside them; uneven weights, one
    of them 0."""
    g = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(B, T, V, generator=g, dtype=torch.float64)
    targets = torch.randint(V, (B, T), generator=g)
    logp = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    draws = [torch.randn(B, T, generator=g, dtype=torch.float64) for _ in range(6)]
    targets[0, 1] = targets[2, 3:] = -100
    weights = TokenWeights(*(x.abs() + 0.1 for x in draws[:3]))
    for weight in weights:
        weight[1, 2] = 0.0
    call = {
        "advantages": draws[3],
        "token_weight": weights,
        "old_logp": logp + 0.4 * draws[4],
        "ref_logp": logp + 0.3 * draws[5],
        "weighting": WEIGHTING,
    }
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("advantages", "old_logp", "ref_logp"):
        call[name] = call[name].to(device, sums)
    call["token_weight"] = TokenWeights(*(x.to(device, sums) for x in weights))
    return logits.to(device, dtype), targets.to(device), call


def gradient(logits, loss_of):
    """Of the summed loss in the logits, then all fields of the output."""
    leaf = logits.detach().clone().requires_grad_()
    out = loss_of(leaf)
    (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
    return grad, out.loss.sum().detach(), *out[1:]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_composed_loss_is_the_fused_one(surrogate):
    """For every estimator of the KL term; off-policy, on-policy, and from a given log-ratio."""
    logits, targets, call = batch()
    old_logp = call.pop("old_logp")
    ratios = (old_logp, None, LogRatio(call["ref_logp"] - old_logp))
    for i, estimator in enumerate(KL_ESTIMATORS):
        objective = Objective(
            surrogate=surrogate,
            kl_estimator=estimator,
            kl_ratio=i % 2 == 1,
            kl_coef=0.3,
            entropy_coef=0.2,
            dual_clip=1.5 if surrogate == "clip" else None,
            log_ratio_limit=0.6,
            kl_limit=0.5,
        )
        results = [
            gradient(
                logits,
                lambda z, objective=each, ratio=ratios[i % 3]: policy_loss(
                    z,
                    targets,
                    **call,
                    old_logp=ratio,
                    objective=objective,
                    compute=Compute("reference"),
                ),
            )
            for each in (objective, replace(objective, reduce=False))
        ]
        for fused, composed in zip(*results, strict=True):
            torch.testing.assert_close(composed, fused, rtol=1e-12, atol=1e-14)


def test_per_token_losses(path, backend, device):
    """Like the targets, with a gradient for each; their sum is the fused loss."""
    logits, targets, call = batch(device, torch.float32)
    options = {"objective": Objective(entropy_coef=0.1), "compute": Compute(backend)}
    fused = gradient(logits, lambda z: policy_loss(z, targets, **call, **options))
    options["objective"] = Objective(entropy_coef=0.1, reduce=False)
    composed = gradient(logits, lambda z: policy_loss(z, targets, **call, **options))
    for a, b in zip(composed, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    leaf = logits.clone().requires_grad_()
    loss = policy_loss(leaf, targets, **call, **options).loss
    assert loss.shape == targets.shape
    upstream = torch.arange(float(B * T), device=device).view(B, T)
    (scaled,) = torch.autograd.grad(loss, leaf, upstream)
    torch.testing.assert_close(scaled, composed[0] * upstream[..., None], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(policy_loss(leaf, targets, **call, **options).loss, loss)


def plain_gspo(logits, targets, call, ids, objective):
    """arXiv 2507.18071 in plain torch, sequence by sequence."""
    logp = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    total = logits.new_zeros(())
    for i in ids.unique():
        member = (ids == i) & (targets != -100)
        if i < 0:
            ratio = torch.ones_like(logp[member])
        else:
            mean = (logp - call["old_logp"])[member].mean()
            if objective.ratio_level == "sequence_token":
                ratio = (mean.detach() + logp - logp.detach())[member].exp()
            else:
                ratio = mean.exp().expand(int(member.sum()))
        advantage, weight = call["advantages"][member], call["token_weight"].policy[member]
        bounded = ratio.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high)
        total = total - (weight * torch.minimum(ratio * advantage, bounded * advantage)).sum()
    return total


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
@pytest.mark.parametrize("packed", [False, True])
def test_gspo(level, packed, path, backend, device):
    """Uneven weights; sequences that are rows, and sequences by id across rows."""
    logits, targets, call = batch(device, torch.float32)
    call["weighting"] = None
    objective = Objective(0.05, 0.08, ratio_level=level)
    rows = torch.arange(B, device=device)[:, None].expand(B, T)
    if packed:
        # One of them has the token without a weight, which its mean counts all the same.
        ids = torch.tensor([7, 7, 7, 2, 2, 2, 2, 40, 40, 40, 40, 40, -1, -1, 7], device=device)
        ids = ids.view(B, T)
        given = Sequences(call["old_logp"], ids)
    else:
        ids = rows.masked_fill(call["token_weight"].policy == 0, -1)
        given = call["old_logp"]
    leaf = logits.double().requires_grad_()
    expected = plain_gspo(leaf, targets, call, ids, objective)
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    grad, loss, *fields = gradient(
        logits,
        lambda z: policy_loss(
            z,
            targets,
            **{**call, "old_logp": given},
            objective=objective,
            compute=Compute(backend),
        ),
    )
    assert expected_grad.abs().amax() > 1e-3
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-6)
    left_out = (call["token_weight"].policy == 0) | (targets == -100)
    for field in fields:
        assert field[left_out].eq(0).all()


def test_a_token_without_a_weight_is_not_read(backend, device):
    """Whatever its logits hold; but where it belongs to a sequence that is given, its mean does."""
    logits, targets, call = batch(device, torch.float32)
    for level in ("token", "sequence", "sequence_token"):
        objective = Objective(ratio_level=level, reduce=level != "token")
        spoiled = logits.clone()
        spoiled[1, 2], spoiled[0, 1] = torch.nan, torch.inf
        clean, dirty = (
            gradient(
                z,
                lambda z, objective=objective: policy_loss(
                    z, targets, **call, objective=objective, compute=Compute(backend)
                ),
            )
            for z in (logits, spoiled)
        )
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_log_probs_in_place_of_logits(level, path):
    """The loss of `token_stats`, differentiable through them; fields that are not given are NaN."""
    logits, targets, call = batch()
    objective = Objective(0.05, 0.08, entropy_coef=0.1, ratio_level=level, reduce=False)

    def of_logits(z):
        return policy_loss(z, targets, **call, objective=objective)

    def of_stats(z):
        return policy_loss(token_stats(z, targets), targets, **call, objective=objective)

    for a, b in zip(gradient(logits, of_stats), gradient(logits, of_logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    logp = token_stats(logits, targets).logp
    logp[0, 1], logp[1, 2] = torch.nan, -torch.inf  # ignored, and without a weight
    logp.requires_grad_()
    call["weighting"] = None
    out = policy_loss(LogProbs(logp), targets, **call)
    assert out.loss.isfinite() and out.ratio.isfinite().all()
    assert out.entropy.isnan().all() and out.polarity.isnan().all()
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert grad[0, 1] == 0 and grad[1, 2] == 0 and grad.abs().amax() > 0


@pytest.mark.parametrize(
    ("given", "more", "error", "words"),
    [
        ({}, {"objective": Objective(entropy_coef=0.1)}, TypeError, r"entropy: .*entropy_coef"),
        ({}, {"weighting": WEIGHTING}, TypeError, r"unit_polarity: .*weighting"),
        ({}, {"temperature": 0.5}, ValueError, r"temperature: expected 1\.0"),
        ({"logp": torch.zeros(2)}, {}, ValueError, r"logp: expected shape \(3,\)"),
        ({"logp": torch.zeros(3).half()}, {}, TypeError, r"logp: expected float32 or float64"),
        ({"entropy": 1.0}, {}, TypeError, r"entropy: expected a tensor or None, got float"),
    ],
)
def test_log_probs_that_are_refused(given, more, error, words):
    ones = torch.ones(3)
    with pytest.raises(error, match=words):
        policy_loss(LogProbs(**{"logp": -ones, **given}), ones.long(), ones, ones, **more)


@pytest.mark.parametrize(
    ("old_logp", "level", "words"),
    [
        (LogRatio(torch.zeros(2, 3)), "sequence", "expected a tensor or Sequences"),
        (Sequences(None, torch.zeros(2, 3)), "token", "expected a tensor or LogRatio"),
        (Sequences(None, torch.zeros(2, 3)), "sequence", r"old_logp\.ids: expected int64"),
    ],
)
def test_ratios_that_are_refused(old_logp, level, words):
    ones = torch.ones(2, 3)
    with pytest.raises(TypeError, match=words):
        policy_loss(
            torch.zeros(2, 3, 4),
            ones.long(),
            ones,
            ones,
            old_logp=old_logp,
            objective=Objective(ratio_level=level),
        )


def test_packed_targets_need_the_ids_of_their_sequences():
    ones = torch.ones(3)
    objective = Objective(ratio_level="sequence")
    with pytest.raises(ValueError, match=r"expected Sequences\(old_logp, ids\)"):
        policy_loss(torch.zeros(3, 4), ones.long(), ones, ones, objective=objective)


# ---- float16 ------------------------------------------------------------------------------------


def half_case(kind):
    """What is differentiated, and the loss of it. Most of its gradient is below float16's least
    normal number, and vanishes where it is rounded before it is scaled."""
    g = torch.Generator().manual_seed(1)
    n, v, d = 8, 64, 16
    targets = torch.randint(v, (n,), generator=g)
    advantages = torch.randn(n, generator=g)
    token_weight = torch.full((n,), 1e-4 if kind == "logits" else 1e-6)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g)
    leaf = (4.0 * torch.randn(n, v, generator=g) if kind == "logits" else hidden).half()

    def loss(x, compute):
        logits = x if kind == "logits" else Head(weight.to(x.dtype))(x)
        return policy_loss(logits, targets, advantages, token_weight, compute=compute).loss

    return leaf, loss


@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize("grad_scale", [None, 65536.0, 1024.0])
def test_float16_loses_nothing_before_the_scale(kind, grad_scale, path):
    """At a scale of 65536 there is a zero only where the exact gradient rounds to one."""
    leaf, loss_of = half_case(kind)
    exact = leaf.double().requires_grad_()
    (expected,) = torch.autograd.grad(65536.0 * loss_of(exact, Compute("reference")), exact)
    rounded = expected.half()
    leaf.requires_grad_()
    for inplace in (False, True) if kind == "logits" else (False,):
        x = leaf.mul(1.0) if inplace else leaf
        loss = loss_of(x, Compute("cpu", inplace=inplace, grad_scale=grad_scale))
        torch.testing.assert_close(
            loss.detach().double(), loss_of(exact, Compute("reference")).detach(), rtol=1e-6, atol=0
        )
        (grad,) = torch.autograd.grad(65536.0 * loss, leaf)
        if grad_scale != 1024.0:
            assert torch.equal(grad == 0, rounded == 0)
        # One rounding to half, at least 2^-25; a head rounds the gradient of its logits too.
        least = 2.0**-25 * 65536.0 / (grad_scale or 65536.0)
        if kind == "hidden":
            least += 1e-3 * expected.abs().amax().item()
        torch.testing.assert_close(grad.double(), expected, rtol=2.0**-11 + 1e-6, atol=1.01 * least)
    early = torch.autograd.grad(loss_of(exact, Compute("reference")), exact)[0].half()
    assert (early == 0).sum() > (rounded == 0).sum(), "nothing would vanish"


# ---- recomputed activations ---------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_under_checkpoint(reentrant, kind):
    """Reentrant checkpointing hands backward a zero gradient for every output that is not used."""
    logits, targets, call = batch()
    weight = torch.randn(V, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def parts(x):
        z = x if kind == "logits" else Head(weight)(x)
        objective = Objective(ratio_level="sequence", entropy_coef=0.1)
        stats = token_stats(z, targets)
        return policy_loss(z, targets, **call, objective=objective).loss, *stats

    grads = []
    for run in (parts, lambda x: checkpoint(parts, x, use_reentrant=reentrant)):
        leaf = logits.clone().requires_grad_()
        loss, logp, *_ = run(leaf)
        grads.append(torch.autograd.grad(loss, leaf)[0] if not reentrant else None)
        if reentrant:
            (loss + logp.sum()).backward()
            grads[-1] = leaf.grad
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("compiled", [False, True])
def test_lse_is_differentiable(compiled, backend, device):
    """Its gradient is p, whether or not other statistics are used, or stacked with it."""
    logits = torch.tensor([[0.5, 1.5, 0.2]], device=device)
    targets = torch.tensor([2], device=device)

    def nll(z):
        stats = token_stats(Logits(z), targets, compute=Compute(backend))
        return (z.gather(-1, targets[:, None])[:, 0] - stats.lse).sum()

    def stacked(z):
        stats: TokenStats = token_stats(z, targets, compute=Compute(backend))
        return torch.stack(stats)[0].sum()

    expected = torch.tensor([[0.0, 0.0, 1.0]], device=device) - logits.softmax(-1)
    for f in (nll, stacked):
        run = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
        leaf = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(run(leaf), leaf)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
