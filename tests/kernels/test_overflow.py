"""Products of what overflows: 0 where a factor is 0, finite where the product is, and never NaN."""

from __future__ import annotations

import math

import pytest
import torch

from papo_kernels import (
    Compute,
    Logits,
    Objective,
    PolarityWeighting,
    TokenWeights,
    policy_loss,
    token_stats,
)
from papo_kernels.objective import SURROGATES

OBJECTIVES = {name: Objective(surrogate=name) for name in SURROGATES}
OBJECTIVES["dual clip"] = Objective(dual_clip=3.0)
WEIGHTINGS = {
    "unweighted": None,
    "sign": PolarityWeighting(0.5, 0.7),
    "tanh": PolarityWeighting(0.5, 0.7, shape="tanh", sigma=0.1),
}
EVERY_TERM = {"kl_coef": 0.5, "entropy_coef": 0.01}


def run(backend, device, logits, targets, advantages, *, upstream=1.0, **more):
    """The loss of each row of `logits`, and its gradient. Lists in `more` are inputs of tokens."""

    def token(value):
        return torch.tensor(value, device=device) if isinstance(value, list) else value

    leaf = torch.tensor(logits, device=device).requires_grad_()
    out = policy_loss(
        leaf,
        torch.tensor(targets, device=device),
        token(advantages),
        **{name: token(x) for name, x in {"token_weight": [1.0] * len(targets), **more}.items()},
        compute=Compute(backend),
    )
    (dz,) = torch.autograd.grad(out.loss, leaf, torch.full_like(out.loss, upstream))
    return out, dz


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_advantage(name, weighting, backend, device):
    """Of a group with equal rewards: row 0 has a ratio beyond float32, and gives exactly 0."""
    more = {"objective": OBJECTIVES[name], "weighting": WEIGHTINGS[weighting]}
    zeros = [[0.0] * 8] * 2
    out, dz = run(backend, device, zeros, [0, 1], [0.0, 1.0], old_logp=[-100.0, -2.0], **more)
    alone, dz_alone = run(backend, device, zeros[:1], [1], [1.0], old_logp=[-2.0], **more)
    assert out.loss.item() == alone.loss.item()
    assert out.ratio[0] == torch.inf
    assert out.polarity[0] == 0
    assert dz[0].eq(0).all()
    assert torch.equal(dz[1], dz_alone[0])
    if name == "clip" and weighting == "unweighted":
        assert out.loss.item() == pytest.approx(-0.923632, abs=1e-6)


def test_infinite_inputs(backend, device):
    """A weight or an advantage without bound: 0 where the other factor is, else infinite."""
    zeros, inf = [[0.0] * 4] * 2, math.inf
    out, _ = run(backend, device, zeros, [0, 1], [0.0, 1.0], token_weight=[inf, 1.0])
    assert out.loss.item() == -1.0
    out, _ = run(backend, device, zeros, [0, 1], [1.0, 1.0], token_weight=[inf, 1.0])
    assert out.loss.item() == -inf
    weights = TokenWeights(
        torch.tensor([0.0, 1.0], device=device), torch.tensor([1.0, 1.0], device=device)
    )
    more = {"token_weight": weights, "ref_logp": [-1.0, -1.0], "objective": Objective(kl_coef=0.1)}
    out, _ = run(backend, device, zeros, [0, 1], [inf, 1.0], **more)
    gap = -1.0 + math.log(4.0)
    assert out.loss.item() == pytest.approx(-1.0 + 0.2 * (math.exp(gap) - gap - 1.0), rel=1e-6)


@pytest.mark.parametrize("estimator", ["k3", "k3+"])
def test_a_token_that_the_reference_cannot_sample(estimator, backend, device):
    """Its KL is infinite. The slope of k3 is 1, and that of k2 without bound."""
    objective = Objective(kl_coef=0.1, kl_estimator=estimator)
    more = {"ref_logp": [-math.inf], "objective": objective}
    out, dz = run(backend, device, [[0.0] * 8], [1], [0.0], **more)
    assert out.loss.item() == math.inf
    if estimator == "k3":
        assert dz[0].tolist() == pytest.approx([-0.0125, 0.0875] + [-0.0125] * 6)


@pytest.mark.parametrize("surrogate", ["clip", "ce_gppo"])
def test_a_small_weight_brings_a_ratio_back(surrogate, backend, device):
    """e^92.9 is beyond float32, and a millionth of it is not; beside an entropy bonus too."""
    for bonus in (0.0, 0.01):
        objective = Objective(surrogate=surrogate, entropy_coef=bonus)
        logits, old_logp = [[0.0, 0.0, 0.0, -math.inf]], [-math.log(3.0) - 92.9]
        more = {"old_logp": old_logp, "token_weight": [1e-6], "objective": objective}
        out, dz = run(backend, device, logits, [0], [-1.0], **more)
        exact = 1e-6 * math.exp(92.9)
        assert out.loss.item() == pytest.approx(exact, rel=1e-4)
        expected = [exact * 2.0 / 3.0, -exact / 3.0, -exact / 3.0, 0.0]
        assert dz[0].tolist() == pytest.approx(expected, rel=1e-4)
        # As large as float32 allows, as is its gradient.
        out, dz = run(backend, device, logits, [0], [-1.0], **{**more, "token_weight": [8e-3]})
        assert out.loss.item() == pytest.approx(8e3 * exact, rel=1e-4)
        assert dz[0].tolist() == pytest.approx([8e3 * x for x in expected], rel=1e-4)


def test_a_weight_and_k3(backend, device):
    """e^92.9 again, as an estimate of the KL divergence: weighed little, and not at all."""
    logits, ref_logp = [[0.0, 0.0]], [-math.log(2.0) + 92.9]
    more = {"ref_logp": ref_logp, "objective": Objective(kl_coef=0.5)}
    out, dz = run(backend, device, logits, [0], [0.0], token_weight=[1e-6], **more)
    exact = 0.5e-6 * math.exp(92.9)
    assert out.loss.item() == pytest.approx(exact, rel=1e-4)
    assert dz[0].tolist() == pytest.approx([-exact / 2.0, exact / 2.0], rel=1e-4)
    one = torch.ones(1, device=device)
    out, dz = run(
        backend, device, logits, [0], [2.0], token_weight=TokenWeights(one, 0 * one), **more
    )
    assert out.loss.item() == pytest.approx(-2.0)
    assert dz[0].tolist() == pytest.approx([-1.0, 1.0])


def test_a_ratio_brings_k3_back(backend, device):
    """r k3 is about exp(ref_logp - old_logp), though k3 overflows and r underflows."""
    objective = Objective(kl_coef=0.5, kl_ratio=True)
    more = {"old_logp": [-1.0], "ref_logp": [-1.5], "objective": objective}
    out, dz = run(backend, device, [[0.0, -101.0]], [1], [0.0], **more)
    assert out.loss.item() == pytest.approx(0.5 * math.exp(-0.5), rel=1e-4)
    assert dz.abs().max() < 1e-6, "and constant"
    # e^88 is within float32, e^88 times its weight is not; and e^-104 is not.
    logp = -math.log(8.0)
    for weight, past, exact in (
        (100.0, 60.0, 100.0 * math.exp(28.0)),
        (1.0, 104.0, math.exp(-16.0)),
    ):
        weights = TokenWeights(
            torch.tensor([0.0], device=device), torch.tensor([weight], device=device)
        )
        more = {"old_logp": [logp + past], "ref_logp": [logp + 88.0], "token_weight": weights}
        objective = Objective(kl_coef=1.0, kl_ratio=True)
        out, _ = run(backend, device, [[0.0] * 8], [1], [0.0], **more, objective=objective)
        assert out.loss.item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("terms", [{}, EVERY_TERM], ids=["policy", "every_term"])
@pytest.mark.parametrize("upstream", [1.0, -2.0, 0.0, math.inf])
def test_zeros_of_an_overflowing_gradient(upstream, terms, backend, device):
    """Columns of probability 0, a token of probability 1, and an upstream gradient of 0."""
    logits = [[0.0, 1.0, -math.inf, -1e4], [1e4, 0.0, -math.inf, 0.0], [0.0, 1.0, 2.0, 3.0]]
    out, dz = run(
        backend,
        device,
        logits,
        [0, 0, -100],
        [-1.0, -1.0, 1.0],
        old_logp=[-200.0, -200.0, -200.0],
        ref_logp=[200.0, 200.0, 200.0],
        objective=Objective(**terms),
        upstream=upstream,
    )
    assert out.loss == torch.inf
    assert not dz.isnan().any()
    assert dz[0, 2:].eq(0).all()
    assert dz[1:].eq(0).all()
    if terms:
        return  # the policy's and the KL term's slopes are both infinite
    sign = (upstream > 0) - (upstream < 0)
    assert dz[0, :2].sign().tolist() == [sign, -sign]
    assert upstream == 0.0 or dz[0, :2].abs().min() > 1e37


def test_infinite_upstream_gradients_of_statistics(backend, device, dtypes):
    for dtype in dtypes:
        logits = torch.tensor([[0.0, 1.0, -math.inf], [1e4, 0.0, -math.inf]], dtype=dtype)
        targets = torch.tensor([0, 0], device=device)
        for chosen in ([0], [1], [2], [3], [0, 1, 2, 3]):
            leaf = logits.to(device).requires_grad_()
            stats = token_stats(leaf, targets, compute=Compute(backend))
            outputs = [stats[i] for i in chosen]
            upstream = [torch.full_like(x, torch.inf) for x in outputs]
            (dz,) = torch.autograd.grad(outputs, leaf, upstream)
            assert not dz.isnan().any()
            assert dz[:, 2].eq(0).all()
            assert dz[1, 1].eq(0)
            assert len(chosen) > 1 or dz[0, 0].abs() > 1e4


# ---- infinite log-probs --------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_masked_sampled_token(surrogate, backend, device):
    """Whatever its loss, its row has no gradient; the row beside it is as if alone."""
    logits = [[0.0, -math.inf, 1.0], [0.0, 1.0, 2.0]]
    for kl in ({}, {"kl_coef": 0.1}, {"kl_coef": 0.1, "kl_ratio": True}):
        objective = Objective(surrogate=surrogate, entropy_coef=0.01, **kl)
        more = {"old_logp": [-1.0, -1.0], "ref_logp": [-1.0, -1.0], "objective": objective}
        out, dz = run(backend, device, logits, [1, 1], [1.0, 1.0], **more)
        assert out.ratio[0] == 0
        assert not out.loss.isnan()
        assert out.loss.isinf().item() is ("kl_coef" in kl and "kl_ratio" not in kl) or (
            surrogate == "cispo"
        )
        assert dz[0].eq(0).all()
        alone = {k: v[:1] if isinstance(v, list) else v for k, v in more.items()}
        assert torch.equal(dz[1], run(backend, device, logits[1:], [1], [1.0], **alone)[1][0])


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_token_that_the_old_policy_could_not_sample(surrogate, backend, device):
    """Its ratio is infinite. Its loss is what that gives, and NaN where it has none now either."""
    more = {"old_logp": [-math.inf], "objective": Objective(surrogate=surrogate)}
    finite, masked = [[0.0, 1.0]], [[-math.inf, 1.0]]
    out, dz = run(backend, device, finite, [0], [0.0], **more)
    assert out.ratio[0] == torch.inf
    assert out.loss == 0
    assert dz.eq(0).all()
    for advantage in (1.0, -1.0):
        out, dz = run(backend, device, finite, [0], [advantage], **more)
        assert not out.loss.isnan()
        assert not dz.isnan().any()
    for advantage in (0.0, 1.0):
        out, dz = run(backend, device, masked, [0], [advantage], **more)
        assert out.loss.isnan()
        assert dz.eq(0).all()
        out, dz = run(backend, device, masked, [0], [advantage], token_weight=[0.0], **more)
        assert out.loss == 0
        assert dz.eq(0).all()


# ---- a saturated soft cap ------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [30.0, 7.3])
def test_a_saturated_soft_cap_has_no_gradient(softcap, temperature, backend, device, dtypes):
    for dtype in dtypes:
        logits = torch.tensor([[1e4, -1e4, -1e4, 1e4]] * 4, dtype=dtype, device=device)
        leaf = logits.requires_grad_()
        targets = torch.arange(4, device=device)
        one = torch.ones(4, device=device)
        compute = Compute(backend)
        more = {"temperature": temperature, "compute": compute}
        stats = token_stats(Logits(leaf, softcap=softcap), targets, **more)
        assert stats.logp.isfinite().all()
        (dz,) = torch.autograd.grad([x.sum() for x in stats], leaf)
        assert dz.eq(0).all()
        objective = Objective(entropy_coef=0.1)
        capped = Logits(leaf, softcap=softcap)
        out = policy_loss(capped, targets, one, one, objective=objective, **more)
        assert torch.autograd.grad(out.loss, leaf)[0].eq(0).all()
