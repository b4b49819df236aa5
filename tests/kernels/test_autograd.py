"""Backward passes: every way in which autograd may ask for a gradient or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

from papo_kernels import (
    Compute,
    Head,
    LogProbs,
    PolarityWeighting,
    policy_loss,
    token_stats,
)
from tests.cases import make_case, make_loss_case

pytestmark = [pytest.mark.usefixtures("path"), pytest.mark.plumbing]
FIELDS = ("logp", "entropy", "unit_polarity", "lse")


def test_absent_upstream_gradients(backend, device, dtypes):
    """Each statistic alone; and their sum is the sum of the four gradients."""
    for dtype in dtypes[-3:-1]:
        case = make_case("normal", 9, 75, dtype=dtype, device=device)
        leaf = case.logits.requires_grad_()
        alone = []
        for name in FIELDS:
            value = getattr(case.token_stats(leaf, backend), name)
            alone.append(torch.autograd.grad(value.sum(), leaf)[0])
            assert alone[-1].abs().amax() > 0
        stats = case.token_stats(leaf, backend)
        (together,) = torch.autograd.grad(sum(x.sum() for x in stats), leaf)
        bound = 4 * torch.finfo(dtype).eps * sum(x.abs() for x in alone) + 1e-7
        assert ((together - sum(alone)).abs() <= bound).all()


def test_zero_upstream_gradients(backend, device):
    case = make_case("masked", 9, 75, device=device)
    leaf = case.logits.requires_grad_()
    stats = case.token_stats(leaf, backend)
    (dz,) = torch.autograd.grad(sum((0.0 * x).sum() for x in stats), leaf)
    assert dz.eq(0).all()
    assert dz.shape == leaf.shape


def test_upstream_gradients_of_any_layout(backend, device):
    """Expanded scalars (from .sum()), strided slices, float64 and a transposed batch."""
    case = make_case("normal", 12, 40, device=device)
    leaf = case.logits.requires_grad_()
    g = torch.Generator().manual_seed(2)
    dense = torch.randn(12, generator=g).to(device)
    strided = torch.stack([dense, -dense], 1)[:, 0]
    assert not strided.is_contiguous()
    for name in FIELDS:
        grads = []
        for upstream in (dense, strided):
            value = getattr(case.token_stats(leaf, backend), name)
            grads.append(torch.autograd.grad(value, leaf, upstream)[0])
        assert torch.equal(*grads)
        value = getattr(case.token_stats(leaf, backend), name)
        (of_sum,) = torch.autograd.grad(value.sum(), leaf)
        value = getattr(case.token_stats(leaf, backend), name)
        (of_ones,) = torch.autograd.grad(value, leaf, torch.ones(12, device=device))
        assert torch.equal(of_sum, of_ones)
        value = getattr(case.token_stats(leaf, backend), name)
        (transposed,) = torch.autograd.grad(value.view(3, 4).t(), leaf, dense.view(3, 4).t())
        assert torch.equal(transposed, grads[0])


def test_gradient_of_a_non_contiguous_batch(backend, device):
    """[:, :-1] of a [B, T, V] batch: the gradient lands in the rows that were read."""
    g = torch.Generator().manual_seed(3)
    batch = torch.randn(3, 5, 40, generator=g).to(device).requires_grad_()
    targets = torch.randint(40, (3, 4), generator=g).to(device)
    token_stats(batch[:, :-1], targets, compute=Compute(backend)).logp.sum().backward()
    assert batch.grad[:, -1].eq(0).all()
    dense = batch.detach()[:, :-1].contiguous().requires_grad_()
    token_stats(dense, targets, compute=Compute(backend)).logp.sum().backward()
    assert torch.equal(batch.grad[:, :-1], dense.grad)


def test_retain_graph(backend, device):
    """Backward twice through a kept graph gives the same twice, whatever the factor between."""
    case = make_loss_case("normal", 9, 50, device=device)
    leaf = case.logits.requires_grad_()
    for value in (
        case.token_stats(leaf, backend).logp.sum(),
        case.token_stats(leaf, backend).unit_polarity.sum(),
        case.policy_loss(leaf, backend).loss,
    ):
        (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
        kept = first.clone()
        (scaled,) = torch.autograd.grad(4.0 * value, leaf, retain_graph=True)
        (last,) = torch.autograd.grad(value, leaf)
        assert torch.equal(first, kept), "a gradient handed out earlier must not change"
        assert torch.equal(last, first)
        assert torch.equal(scaled, 4.0 * first)


@pytest.mark.parametrize("factor", [1.0, 0.0, -1.0, 0.25, 65536.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_scaled_losses(factor, inplace, backend, device, dtypes):
    """A gradient scaler's or an accumulation's factor, powers of two: exactly scaled gradients."""
    for dtype in dtypes[-3:-1]:
        case = make_loss_case("normal", 9, 50, dtype=dtype, device=device)
        leaf = case.logits.requires_grad_()
        (one,) = torch.autograd.grad(case.policy_loss(leaf, backend).loss, leaf)
        out = case.policy_loss(leaf.mul(1.0), backend, inplace=inplace)
        (scaled,) = torch.autograd.grad(factor * out.loss, leaf)
        assert torch.equal(scaled, factor * one)


def test_two_losses_of_the_same_logits(backend, device):
    """Without inplace the logits are free to be used elsewhere, before and after."""
    case = make_loss_case("normal", 9, 50, device=device)
    leaf = case.logits.requires_grad_()
    z = leaf.tanh()
    before, bonus = z.logsumexp(1).sum(), case.token_stats(z, backend).entropy.sum()
    loss = case.policy_loss(z, backend).loss
    again = case.policy_loss(z, backend).loss
    (dz,) = torch.autograd.grad(before + bonus + loss + again, leaf, retain_graph=True)
    parts = [
        torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (before, bonus, loss, again)
    ]
    torch.testing.assert_close(dz, sum(parts), rtol=1e-5, atol=1e-6)
    assert torch.equal(parts[2], parts[3])


def test_modified_logits_are_refused_in_backward(backend, device):
    """token_stats reads the logits again in backward: autograd's version check sees a change."""
    case = make_case("normal", 4, 20, device=device)
    z = case.logits.requires_grad_().mul(1.0)
    logp = case.token_stats(z, backend).logp
    z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_double_backward_is_refused(backend, device):
    case = make_loss_case("normal", 4, 20, device=device)
    leaf = case.logits.requires_grad_()
    for value in (case.token_stats(leaf, backend).logp.sum(), case.policy_loss(leaf, backend).loss):
        with pytest.raises(RuntimeError, match="not differentiable"):
            torch.autograd.grad(value, leaf, create_graph=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_upstream_gradient_of_zero(inplace, backend, device):
    """It gives zeros, though the gradient that was formed is not finite."""
    case = make_loss_case("normal", 9, 50, device=device)
    case = replace(case, token_weight=case.token_weight + 1.0, old_logp=case.old_logp - 200.0)
    case = replace(case, advantages=-case.advantages.abs(), ref_logp=None)
    leaf = case.logits.requires_grad_()
    (grad,) = torch.autograd.grad(case.policy_loss(leaf, backend).loss, leaf)
    assert not grad.mul(1e30).isfinite().all()
    loss = case.policy_loss(leaf.mul(1.0), backend, inplace=inplace).loss
    (zero,) = torch.autograd.grad(0.0 * loss, leaf)
    assert zero.eq(0).all()


def test_no_grad_and_inference_mode(backend, device):
    case = make_loss_case("normal", 6, 20, device=device)
    logits = case.logits.requires_grad_()
    with_grad = case.policy_loss(logits, backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = case.policy_loss(logits, backend, inplace=True)
            stats = case.token_stats(logits, backend)
        assert all(torch.equal(a, b) for a, b in zip(out, with_grad, strict=True))
        assert not any(x.requires_grad for x in (*out, *stats))
    with pytest.raises(RuntimeError, match="does not require grad"):
        case.policy_loss(logits.detach(), backend).loss.backward()


def test_everything_but_the_loss_is_detached(backend, device):
    weighting = PolarityWeighting(0.5, 1.0)
    case = make_loss_case("normal", 6, 20, device=device, weighting=weighting)
    out = case.policy_loss(case.logits.requires_grad_(), backend)
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in out[1:])


def test_backward_in_other_threads(backend, device):
    """Autograd may run a backward pass in a thread of its own."""
    import threading

    case = make_loss_case("normal", 6, 5000, device=device)
    leaf = case.logits.requires_grad_()
    (expected,) = torch.autograd.grad(case.policy_loss(leaf, backend).loss, leaf)
    found = []

    def work():
        for _ in range(3):
            found.append(torch.autograd.grad(case.policy_loss(leaf, backend).loss, leaf)[0])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(torch.equal(x, expected) for x in found)


def _dual(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, torch.ones_like(x)))


MODES = {
    "dual": _dual,
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "operand", ["logits", "hidden", "weight", "log-probs", "advantages", "temperature"]
)
def test_forward_mode_is_refused(mode, operand):
    """A tangent that a kernel lost would be a derivative of 0."""
    g = torch.Generator().manual_seed(0)
    n, v, d = 4, 7, 3
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g)
    targets, ones = torch.arange(n), torch.ones(n)

    def logits_of(x):
        if operand == "log-probs":
            return LogProbs(x)
        if operand == "logits":
            return x
        return Head(weight)(x) if operand == "hidden" else Head(x)(hidden)

    def loss(x):
        if operand == "advantages":
            return policy_loss(torch.zeros(n, v), targets, x, ones).loss
        return policy_loss(logits_of(x), targets, ones, ones).loss

    logits = torch.randn(n, v, generator=g)
    operands = {"hidden": hidden, "weight": weight, "log-probs": -ones, "advantages": ones}
    x = operands.get(operand, logits)
    calls = [loss]
    if operand == "temperature":
        x, calls = ones, []
        for given in (logits, Head(weight)(hidden)):
            calls.append(lambda x, z=given: token_stats(z, targets, temperature=x).logp)
            calls.append(lambda x, z=given: policy_loss(z, targets, ones, ones, temperature=x).loss)
    if operand in ("logits", "hidden", "weight"):
        calls.append(lambda x: token_stats(logits_of(x), targets).logp)
    for call in calls:
        with pytest.raises(NotImplementedError, match="forward-mode"):
            MODES[mode](call, x)
