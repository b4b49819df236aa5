"""Gradients against difference quotients, in float64.

What a loss takes for constant moves under a finite step. Where a surrogate or an estimate of KL has
such a factor, the quotient is that of a loss written out here, in which the factor keeps its value.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from papo_kernels import Compute, Objective, PolarityWeighting, policy_loss, token_stats
from papo_kernels.objective import KL_ESTIMATORS
from papo_kernels.types import LogProbs, Sequences
from tests.cases import make_case, make_loss_case

pytestmark = [
    pytest.mark.plumbing,
    *(pytest.mark.not_for("no float64", backend=name) for name in ("triton", "cuda")),
]
N, V = 10, 5


@pytest.mark.parametrize("kind", ["normal", "peaked", "masked", "offset_up"])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_gradcheck_with_zero_probabilities(kind, softcap, backend):
    """With -inf entries in `masked` (p (log p + H) is 0 * inf there)."""
    if softcap and kind == "offset_up":
        return  # the cap leaves nothing of it to differentiate
    row = {"temperature": 0.8, "softcap": softcap, "vocab_size": 9}
    case = make_case(kind, 6, 11, dtype=torch.float64, **row)
    finite = case.logits[:, :9].isfinite()
    base = case.logits.clone()

    def statistics(values):
        logits = base.clone()
        logits[:, :9] = logits[:, :9].masked_scatter(finite, values)
        return case.token_stats(logits, backend)

    values = base[:, :9][finite].clone().requires_grad_()
    eps = 1e-6 if kind != "offset_up" else 1e-4
    assert gradcheck(statistics, (values,), eps=eps, atol=1e-6, rtol=1e-4)


def test_gradcheck_of_several_ids(backend):
    """Some of them repeated, some ignored, of rows with temperatures of their own."""
    ids = torch.tensor([[0, 3, 3], [1, -100, 2], [4, 4, 4]])
    leaf = torch.randn(3, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def statistics(z):
        return token_stats(z, ids, temperature=temperature, compute=Compute(backend))

    assert gradcheck(statistics, (leaf.requires_grad_(),), atol=1e-7)


# ---- losses -------------------------------------------------------------------------------------


def loss_case(**options):
    more = {name: options.pop(name) for name in ("on_policy", "own_weights") if name in options}
    objective = Objective(entropy_coef=0.2, **options)
    case = make_loss_case(
        "normal", N, V, dtype=torch.float64, softcap=6.0, objective=objective, **more
    )
    return replace(case, logits=case.logits.requires_grad_())


@pytest.mark.parametrize("estimator", [x for x in KL_ESTIMATORS if not x.endswith("+")])
@pytest.mark.parametrize("kl_ratio", [False, True])
def test_gradcheck_of_the_estimates(estimator, kl_ratio, backend):
    """Beside the surrogates without a constant factor; the upstream gradient is not 1."""
    for options in ({"surrogate": "clip", "dual_clip": 2.0}, {"surrogate": "sapo"}):
        kl = {"kl_coef": 0.3, "kl_estimator": estimator, "kl_ratio": kl_ratio}
        case = loss_case(**options, **kl, kl_limit=1.5, log_ratio_limit=0.5, own_weights=True)
        assert gradcheck(lambda z, c=case: 1.7 * c.policy_loss(z, backend).loss, (case.logits,))


def frozen(case, z, out, backend):
    """Each token's loss with the constants of `out`."""
    o, stats = case.objective, case.token_stats(z, backend)
    moved, old_r = (stats.logp - out.logp).exp(), out.ratio
    advantages, weight = case.advantages, case.token_weight
    if o.surrogate == "ce_gppo":
        low, high = o.gppo_scale[0] * (1.0 - o.clip_low), o.gppo_scale[1] * (1.0 + o.clip_high)
        kept = torch.where(out.clip_side == 1, low, torch.where(out.clip_side == 2, high, old_r))
        policy = -kept * moved * advantages
    elif o.surrogate == "cispo":
        policy = -old_r.clamp(1.0 - o.clip_low, 1.0 + o.clip_high) * advantages * stats.logp
    else:
        policy = -old_r * (out.clip_side == 0) * advantages * stats.logp
    kl = 0.5 * (stats.logp - case.ref_logp).square()
    return weight * (policy + o.kl_coef * kl - o.entropy_coef * stats.entropy)


@pytest.mark.parametrize(
    ("surrogate", "estimator"),
    [("cispo", "k3+"), ("dppo_tv", "abs+"), ("dppo_kl", "k1+"), ("ce_gppo", "k3+")],
)
def test_gradients_at_constant_factors(surrogate, estimator, backend):
    """The gradient of k2 beside another estimate's value among them."""
    case = loss_case(surrogate=surrogate, kl_coef=0.3, kl_estimator=estimator)
    out = case.policy_loss(case.logits, backend)
    (actual,) = torch.autograd.grad(out.loss, case.logits)
    assert out.clip_side.unique().numel() > 1
    of_frozen = difference_quotients(lambda z: frozen(case, z, out, backend), case.logits)
    torch.testing.assert_close(actual, of_frozen, rtol=1e-5, atol=1e-8)


def difference_quotients(losses, leaf):
    """The gradient of the sum of `losses(leaf)`, each of which depends on its own row alone."""
    step = 1e-5 * torch.eye(V, dtype=leaf.dtype)
    with torch.no_grad():
        columns = [losses(leaf + h) - losses(leaf - h) for h in step]
    return torch.stack(columns, 1) / 2e-5


def test_gradient_on_policy(backend):
    """r = exp(logp - stop_gradient(logp)) is 1 under a finite step too: its quotient is not its
    gradient. exp(logp - old_logp) at old_logp = logp has both."""
    case = loss_case(kl_coef=0.3, on_policy=True)
    (here,) = torch.autograd.grad(case.policy_loss(case.logits, backend).loss, case.logits)
    old_logp = case.token_stats(case.logits, backend).logp.detach()
    there = replace(case, old_logp=old_logp).policy_loss(case.logits, backend).loss
    torch.testing.assert_close(here, torch.autograd.grad(there, case.logits)[0])


# ---- composed losses ----------------------------------------------------------------------------


def test_gradcheck_of_a_loss_per_token(backend):
    """For upstream gradients that differ."""
    case = loss_case(kl_coef=0.3, kl_ratio=True, reduce=False, own_weights=True)
    assert gradcheck(lambda z: case.policy_loss(z, backend).loss, (case.logits,))


SEQUENCES = torch.tensor([5, 5, 5, 8, 8, 8, 8, -1, 5, 8])


@pytest.mark.parametrize("surrogate", ["clip", "sapo"])
def test_gradcheck_of_gspo(surrogate, backend):
    """Uneven weights; a token in no sequence, and sequences whose ratio reaches the KL term."""
    options = {"surrogate": surrogate, "kl_ratio": True, "kl_coef": 0.3, "reduce": False}
    case = loss_case(**options, ratio_level="sequence", clip_low=0.9, clip_high=2.0)
    case = replace(case, old_logp=Sequences(case.old_logp, SEQUENCES))
    assert gradcheck(lambda z: case.policy_loss(z, backend).loss, (case.logits,))


def test_gradient_of_gspo_per_token(backend):
    """At the sequences' constant ratios, of which a token's own logp moves its own."""
    case = loss_case(ratio_level="sequence_token", clip_low=0.9, clip_high=2.0)
    case = replace(case, old_logp=Sequences(case.old_logp, SEQUENCES))
    out = case.policy_loss(case.logits, backend)
    (actual,) = torch.autograd.grad(out.loss, case.logits)
    assert out.clip_side.eq(0).all()

    def losses(z):
        stats = case.token_stats(z, backend)
        inside = SEQUENCES >= 0
        ratio = torch.where(inside, out.ratio * (stats.logp - out.logp).exp(), 1.0)
        terms = -ratio * case.advantages - case.objective.entropy_coef * stats.entropy
        return case.token_weight * terms

    of_frozen = difference_quotients(losses, case.logits)
    torch.testing.assert_close(actual, of_frozen, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck_of_log_probs(level, backend):
    """By logp and by entropy, at a constant weight."""
    case = loss_case(kl_coef=0.3, ratio_level=level, reduce=False, clip_low=0.9, clip_high=2.0)
    stats = case.token_stats(case.logits.detach(), backend)
    old_logp = Sequences(case.old_logp, SEQUENCES) if level == "sequence" else case.old_logp
    leaves = [x.clone().requires_grad_() for x in (stats.logp, stats.entropy)]

    def loss(logp, entropy):
        return policy_loss(
            LogProbs(logp, entropy, stats.unit_polarity),
            case.targets,
            case.advantages,
            case.token_weight,
            old_logp=old_logp,
            ref_logp=case.ref_logp,
            objective=case.objective,
            weighting=PolarityWeighting(0.3, 0.8),
            compute=Compute(backend),
        ).loss

    assert gradcheck(loss, leaves)
