"""The policy loss beside its surrogate: entropy bonus, weighting, masks, rows that are broken."""

from __future__ import annotations

import math

import pytest
import torch

from papo_kernels import Compute, Objective, PolarityWeighting, policy_loss, token_stats
from tests.cases import P_A, make_loss_case, one_token
from tests.oracle import check_policy_loss


def test_kl_without_coefficient_ignores_the_reference(backend, device):
    plain, dlogp = one_token(backend, device)
    nan = torch.full((1,), torch.nan, device=device)
    with_ref, dlogp_ref = one_token(backend, device, ref_logp=nan)
    assert torch.equal(plain.loss, with_ref.loss)
    assert dlogp == dlogp_ref


@pytest.mark.parametrize("coef", [0.3, -0.3])
def test_entropy_bonus(coef, backend, device):
    H = -sum(p * math.log(p) for p in (0.4, 0.35, 0.25))
    out, _ = one_token(backend, device, advantage=0.0, objective=Objective(entropy_coef=coef))
    assert out.loss.item() == pytest.approx(-coef * H, rel=1e-5)
    case = make_loss_case("normal", 8, 50, device=device, objective=Objective(entropy_coef=1.0))
    case.advantages.zero_()
    logits = case.logits.requires_grad_()
    bonus = case.policy_loss(logits, backend).loss
    entropy = (case.token_weight * case.token_stats(logits, backend).entropy).sum()
    a, b = (torch.autograd.grad(x, logits)[0] for x in (bonus, -entropy))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_clipped_tokens_keep_their_kl_and_entropy_gradients(backend, device):
    """Clipping takes away the policy gradient only."""
    objective = Objective(kl_coef=0.5, entropy_coef=0.0)
    ref_logp = torch.tensor([math.log(P_A) + 0.7], device=device)
    out, dlogp = one_token(backend, device, 3.0, 1.0, objective=objective, ref_logp=ref_logp)
    assert out.clipped.item()
    assert dlogp == pytest.approx(-0.5 * math.expm1(0.7), rel=1e-5)


def test_clipped_rows_have_exactly_no_gradient(backend, device, sizes):
    for inplace in (False, True):
        case = make_loss_case("normal", sizes(40, 16), 70, device=device)
        leaf = case.logits.requires_grad_()
        out = case.policy_loss(leaf.mul(1.0), backend, inplace=inplace)
        (dz,) = torch.autograd.grad(out.loss, leaf)
        assert out.clipped.sum() > 2
        assert dz[out.clipped].eq(0).all()
        kept = ~out.clipped & (case.targets != -100) & (case.token_weight != 0)
        assert dz[kept].abs().amax(1).gt(0).all()


def test_on_policy_ratio_is_one_with_gradient(backend, device, dtypes, sizes):
    """old_logp absent, and old_logp from the same kernel: both exactly 1, bit for bit the same.

    (Not for the reference, which forms the loss in float64 and reports float32.)
    """
    for dtype in dtypes:
        case = make_loss_case(
            "normal", sizes(20, 4), 333, dtype=dtype, device=device, on_policy=True
        )
        leaf = case.logits.requires_grad_()
        absent = case.policy_loss(leaf, backend)
        used = (case.targets != -100) & (case.token_weight != 0)
        assert absent.ratio[used].eq(1).all()
        assert not absent.clipped.any()
        (dz,) = torch.autograd.grad(absent.loss, leaf)
        assert dz.abs().amax() > 0
        given = policy_loss(
            leaf,
            case.targets,
            case.advantages,
            case.token_weight,
            old_logp=case.token_stats(case.logits, backend).logp.detach(),
            compute=Compute(backend),
        )
        (dz_given,) = torch.autograd.grad(given.loss, leaf)
        if backend == "reference" and dtype != torch.float64:
            torch.testing.assert_close(given.ratio[used], absent.ratio[used], rtol=0, atol=2e-6)
            continue
        assert given.ratio[used].eq(1).all()
        assert torch.equal(given.loss, absent.loss)
        assert torch.equal(dz_given, dz)


# ---- weighting ----------------------------------------------------------------------------------


def test_polarity_and_its_sign(backend, device):
    """A rare token (c > 0) rewarded expands entropy; the argmax (c < 0) rewarded contracts it."""
    logits = torch.tensor([[3.0, 0.0, 0.0, 0.0]], device=device).expand(4, 4)
    targets = torch.tensor([0, 0, 1, 1], device=device)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], device=device)
    weighting = PolarityWeighting(0.5, 1.0)
    out = policy_loss(
        logits,
        targets,
        advantages,
        torch.ones(4, device=device),
        weighting=weighting,
        compute=Compute(backend),
    )
    assert out.unit_polarity.sign().tolist() == [-1, -1, 1, 1]
    assert out.polarity.sign().tolist() == [-1, 1, 1, -1]
    assert out.weight.tolist() == [0.5, 1.5, 1.5, 0.5]


def test_dead_zone(backend, device):
    """Within it h is 0, whatever the advantage; its edge belongs to it."""
    logits = torch.zeros(1, 4, device=device)
    logits[0, 0] = 7.0  # c = -6e-5
    arguments = (logits, torch.tensor([0], device=device), torch.tensor([1e6], device=device))
    one = torch.ones(1, device=device)
    c = token_stats(*arguments[:2], compute=Compute(backend)).unit_polarity.abs().item()
    assert 1e-5 < c < 1e-3
    for dead_zone, weight in [(0.5 * c, 0.6), (2.0 * c, 1.0), (0.0, 0.6)]:
        weighting = PolarityWeighting(0.5, 0.8, dead_zone=dead_zone)
        out = policy_loss(*arguments, one, weighting=weighting, compute=Compute(backend))
        assert out.weight.item() == pytest.approx(weight)
    uniform = torch.zeros(1, 4, device=device)
    weighting = PolarityWeighting(0.9, 1.0)
    out = policy_loss(uniform, *arguments[1:], one, weighting=weighting, compute=Compute(backend))
    assert out.weight.item() == 1.0, "the default dead zone swallows rounding noise"


@pytest.mark.parametrize("shape", ["sign", "tanh"])
def test_weighting_scalars_as_tensors(shape, backend, device, sizes):
    """Floats and 0-dim tensors of any float dtype give the same, also when read after a change."""
    values = {"phase": -0.75, "sigma": 0.125, "scale": 1.25}
    case = make_loss_case("normal", sizes(20, 4), 40, device=device)
    tensors = {
        name: torch.tensor(x, dtype=torch.float64, device=device) for name, x in values.items()
    }
    arguments = (case.logits, case.targets, case.advantages, case.token_weight)

    def run(scalars):
        weighting = PolarityWeighting(0.5, shape=shape, **scalars)
        return policy_loss(
            *arguments, old_logp=case.old_logp, weighting=weighting, compute=Compute(backend)
        )

    assert all(torch.equal(a, b) for a, b in zip(run(values), run(tensors), strict=True))
    tensors["phase"].neg_()
    changed = run({**values, "phase": 0.75})
    assert all(torch.equal(a, b) for a, b in zip(changed, run(tensors), strict=True))
    assert not torch.equal(run(values).weight, changed.weight)


def test_weight_carries_no_gradient(backend, device, sizes):
    """The gradient is that of the loss with the reported weights as constants."""
    weighting = PolarityWeighting(0.9, 1.0, shape="tanh", sigma=0.05, scale=1.3)
    case = make_loss_case("normal", sizes(12, 5), 30, device=device, weighting=weighting)
    leaf = case.logits.requires_grad_()
    out = case.policy_loss(leaf, backend)
    by_hand = policy_loss(
        leaf,
        case.targets,
        case.advantages * out.weight,
        case.token_weight,
        old_logp=case.old_logp,
        compute=Compute(backend),
    )
    a, b = (torch.autograd.grad(x.loss, leaf)[0] for x in (out, by_hand))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert not any(x.requires_grad for x in out[1:])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_clipping_does_not_depend_on_the_weight(advantage, backend, device):
    """w > 0: it scales the token's loss and never decides what is clipped."""
    for ratio in (0.5, 0.9, 1.1, 1.5, 4.0):
        objective = Objective(dual_clip=3.0)
        plain, slope = one_token(backend, device, ratio, advantage, objective=objective)
        weighting = PolarityWeighting(0.9, 0.9, scale=0.8)
        out, weighted = one_token(
            backend, device, ratio, advantage, objective=objective, weighting=weighting
        )
        assert torch.equal(out.clipped, plain.clipped)
        assert out.loss.item() == pytest.approx(out.weight.item() * plain.loss.item(), rel=1e-6)
        assert weighted == pytest.approx(out.weight.item() * slope, rel=1e-6, abs=1e-12)


# ---- tokens that do not count, rows that are broken ---------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_tokens_that_do_not_count_contribute_exactly_nothing(
    poison, inplace, backend, device, sizes
):
    """Weight 0 or target -100, over NaN logits, NaN advantages and NaN old_logp."""
    weighting = PolarityWeighting(0.5, 1.0)
    case = make_loss_case("normal", sizes(14, 6), 60, device=device, weighting=weighting)
    off = (case.targets == -100) | (case.token_weight == 0)
    assert case.targets.eq(-100).any()
    assert (case.token_weight == 0).any()
    results = []
    for value in (0.0, poison):
        leaf = case.logits.masked_fill(off[:, None], value).requires_grad_()
        for x in (case.advantages, case.old_logp, case.ref_logp):
            x.masked_fill_(off, value)
        out = case.policy_loss(leaf.mul(1.0), backend, inplace=inplace)
        results.append((*out, *torch.autograd.grad(out.loss, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    loss, *per_token, dz = results[1]
    assert loss.isfinite()
    assert all(x[off].eq(0).all() for x in (*per_token, dz))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, "all -inf"])
@pytest.mark.parametrize("column", [0, 5, 69])
def test_bad_rows_are_nan_and_leave_their_neighbors_alone(
    value, column, backend, device, dtypes, sizes
):
    n, bad = sizes((9, [1, 8]), (3, [1]))
    for dtype in sizes(dtypes[-3:], dtypes[:1]):
        case = make_loss_case(
            "normal",
            n,
            70,
            dtype=dtype,
            device=device,
            objective=Objective(entropy_coef=0.1),
            softcap=20.0 if column == 69 else None,  # tanh would make +inf finite
        )
        case.targets[bad[-1]], case.targets[1] = 3, column
        case.token_weight[bad] = 1.0
        poisoned = case.logits.clone()
        if value == "all -inf":
            poisoned[bad] = -torch.inf
        else:
            poisoned[bad, column] = value
        good = torch.tensor([i not in bad for i in range(n)], device=device)
        results = []
        for logits in (case.logits, poisoned):
            leaf = logits.requires_grad_()
            stats = case.token_stats(leaf, backend)
            (dstats,) = torch.autograd.grad(sum(x.sum() for x in stats[:3]), leaf)
            out = case.policy_loss(leaf.mul(1.0), backend, inplace=True)
            (dloss,) = torch.autograd.grad(out.loss, leaf)
            results.append((*stats, *out[1:], dstats, dloss))
            last = out
        assert last.loss.isnan()
        clean, hurt = results
        assert all(torch.equal(a[good], b[good]) for a, b in zip(clean, hurt, strict=True))
        floats = [x for x in hurt if x.is_floating_point()]
        assert all(x[bad].isnan().all() for x in floats)
        assert not last.clipped[bad].any()


def test_masked_sampled_token(backend, device):
    """logp -inf, ratio 0, and no gradient from any term of its row."""
    case = make_loss_case("normal", 4, 30, device=device, objective=Objective(entropy_coef=0.1))
    case.logits[1, case.targets[1]] = -torch.inf
    check_policy_loss(case, backend)
    leaf = case.logits.requires_grad_()
    stats = case.token_stats(leaf, backend)
    assert stats.logp[1] == -torch.inf
    assert stats.entropy[1].isfinite()
    finite = torch.tensor([0, 2, 3], device=device)
    total = stats.logp[finite].sum() + stats.entropy.sum() + stats.unit_polarity.sum()
    (dz,) = torch.autograd.grad(total, leaf)
    assert dz.isfinite().all()
    assert dz[1].eq(0).all()
    out = case.policy_loss(leaf, backend)
    assert out.ratio[1] == 0
    assert out.loss.isfinite()
    assert torch.autograd.grad(out.loss, leaf)[0][1].eq(0).all()


def test_sampled_token_masked_with_kl_is_loud(backend, device):
    """KL to a reference that gives the token mass is infinite: reported, not hidden."""
    case = make_loss_case("normal", 3, 30, device=device, objective=Objective(kl_coef=0.1))
    case.logits[1, case.targets[1]] = -torch.inf
    out = case.policy_loss(case.logits, backend)
    assert out.loss == torch.inf


def test_no_rows(backend, device, dtypes):
    for dtype in dtypes:
        case = make_loss_case("normal", 0, 40, dtype=dtype, device=device)
        for inplace in (False, True):
            leaf = case.logits.requires_grad_()
            out = case.policy_loss(leaf.mul(1.0), backend, inplace=inplace)
            out.loss.backward()
            assert out.loss == 0
            assert leaf.grad.shape == (0, 40)
            assert all(x.shape == (0,) for x in out[1:])
        stats = case.token_stats(leaf, backend)
        assert all(x.shape == (0,) for x in stats)
        stats.logp.sum().backward()


@pytest.mark.plumbing
def test_microbatches_add_up(backend, device):
    """With a global normalizer in token_weight, loss and gradient of parts sum to the whole's."""
    weighting = PolarityWeighting(0.5, 0.5)
    case = make_loss_case("normal", 24, 64, device=device, weighting=weighting)
    whole = case.logits.detach().clone().requires_grad_()
    parts = case.logits.detach().clone().requires_grad_()
    loss = case.policy_loss(whole, backend).loss
    loss.backward()
    total = 0.0
    for rows in (slice(0, 5), slice(5, 16), slice(16, 24)):
        out = policy_loss(
            parts[rows],
            case.targets[rows],
            case.advantages[rows],
            case.token_weight[rows],
            old_logp=case.old_logp[rows],
            weighting=weighting,
            compute=Compute(backend),
        )
        out.loss.backward()
        total += out.loss.item()
    assert torch.equal(whole.grad, parts.grad)
    assert total == pytest.approx(loss.item(), rel=1e-6)
