"""`Compute(inplace=True)`: the gradient takes the logits' storage, and every misuse is refused;
peers corrupt other gradients silently."""

from __future__ import annotations

import pytest
import torch

from papo_kernels import Compute, Objective, PolarityWeighting, policy_loss
from tests.cases import make_loss_case
from tests.oracle import check_policy_loss

pytestmark = [pytest.mark.usefixtures("path"), pytest.mark.plumbing]
EVERY_TERM = Objective(clip_high=0.28, dual_clip=1.5, kl_coef=0.04, entropy_coef=0.01)


def small_case(device, **more):
    return make_loss_case("normal", 9, 50, device=device, **more)


def test_same_as_out_of_place(backend, device, dtypes):
    for dtype in dtypes:
        for kind in ("normal", "masked"):
            case = make_loss_case(
                kind,
                12,
                301,
                dtype=dtype,
                device=device,
                objective=EVERY_TERM,
                weighting=PolarityWeighting(0.5, 0.7),
            )
            check_policy_loss(case, backend, inplace=True)
            leaf = case.logits.requires_grad_()
            results = []
            for inplace in (False, True):
                out = case.policy_loss(leaf.mul(1.0), backend, inplace=inplace)
                results.append((*out, *torch.autograd.grad(out.loss, leaf)))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class _Recorder(torch.autograd.Function):
    """A copy, which notes where the gradient that reaches it is stored."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(grad.data_ptr())
        return grad, None


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_gradient_lies_in_the_storage_of_the_logits(factor, backend, device):
    case, seen = small_case(device), []
    z = _Recorder.apply(case.logits.requires_grad_(), seen)
    address = z.data_ptr()
    (factor * case.policy_loss(z, backend, inplace=True).loss).backward()
    assert seen == [address]


def test_any_leading_shape(backend, device):
    case = make_loss_case("normal", 12, 33, device=device)
    leaf = case.logits.requires_grad_()
    (expected,) = torch.autograd.grad(case.policy_loss(leaf, backend).loss, leaf)

    def batch(x):
        return x.reshape(2, 3, 2)

    z = leaf.reshape(2, 3, 2, 33).mul(1.0)
    out = policy_loss(
        z,
        *map(batch, (case.targets, case.advantages, case.token_weight)),
        old_logp=batch(case.old_logp),
        compute=Compute(backend, inplace=True),
    )
    assert torch.equal(torch.autograd.grad(out.loss, leaf)[0], expected)


def test_a_leaf_is_refused(backend, device):
    case = small_case(device)
    leaf = case.logits.requires_grad_()
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match=r"inplace: .*leaf"):
        case.policy_loss(leaf, backend, inplace=True)
    assert torch.equal(leaf.detach(), before)


@pytest.mark.parametrize("view", ["rows", "reshape", "columns"])
def test_a_view_is_refused(view, backend, device):
    """Its base would be overwritten as well."""
    case = small_case(device)
    base = torch.zeros(18, 50, device=device).requires_grad_().mul(1.0)
    views = {
        "rows": lambda: base[::2],
        "reshape": lambda: base.view(2, 9, 50)[0],
        "columns": lambda: torch.zeros(9, 100, device=device).requires_grad_().mul(1.0)[:, :50],
    }
    with pytest.raises(ValueError, match=r"inplace: .*(view|contiguous)"):
        case.policy_loss(views[view](), backend, inplace=True)
    assert base.eq(0).all()


def test_non_contiguous_logits_are_refused(backend, device):
    case = small_case(device)
    strided = torch.empty_strided((9, 50), (1, 9), device=device).requires_grad_() + 0.0
    assert not strided.is_contiguous()
    assert not strided._is_view()
    with pytest.raises(ValueError, match=r"inplace: .*contiguous"):
        case.policy_loss(strided, backend, inplace=True)


def test_logits_saved_by_an_earlier_operation(backend, device):
    """tanh keeps its output for backward; overwriting it must not give a wrong gradient."""
    case = small_case(device)
    z = case.logits.requires_grad_().tanh()
    loss = case.policy_loss(z, backend, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_earlier_loss_of_the_same_logits(backend, device):
    case = small_case(device)
    z = case.logits.requires_grad_().mul(1.0)
    first = case.token_stats(z, backend).entropy.sum()
    loss = case.policy_loss(z, backend, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first + loss).backward()


def test_a_later_use_of_the_logits(backend, device):
    """They hold a gradient by then: a loss of it is refused where its gradient arrives."""
    case = small_case(device)
    z = case.logits.requires_grad_().mul(1.0)
    loss = case.policy_loss(z, backend, inplace=True).loss
    with pytest.raises(RuntimeError, match="overwrote the logits"):
        (loss + z.sum()).backward()


def test_a_second_policy_loss_on_the_same_logits(backend, device):
    case = small_case(device)
    z = case.logits.requires_grad_().mul(1.0)
    first = case.policy_loss(z, backend, inplace=True).loss
    second = case.policy_loss(z, backend).loss
    with pytest.raises(RuntimeError, match="overwrote the logits"):
        (first + second).backward()


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_retain_graph_twice(factor, backend, device):
    """The buffer is handed on by the first backward; the second is refused, whatever the factor."""
    case = small_case(device)
    leaf = case.logits.requires_grad_()
    loss = case.policy_loss(leaf.mul(1.0), backend, inplace=True).loss
    (expected,) = torch.autograd.grad(case.policy_loss(leaf, backend).loss, leaf)
    (dz,) = torch.autograd.grad(factor * loss, leaf, retain_graph=True)
    assert torch.equal(dz, factor * expected)
    kept = dz.clone()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(factor * loss, leaf)
    assert torch.equal(dz, kept)


def test_double_backward_is_refused(backend, device):
    case = small_case(device)
    leaf = case.logits.requires_grad_()
    loss = case.policy_loss(leaf.mul(1.0), backend, inplace=True).loss
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_version_counter(backend, device):
    case = small_case(device)
    z = case.logits.requires_grad_().mul(1.0)
    version = z._version
    case.policy_loss(z, backend, inplace=True)
    assert z._version > version


def test_upstream_parameters_get_the_right_gradient(backend, device):
    """logits = hidden @ weight, a bias and a scale after it: what a model does."""
    g = torch.Generator().manual_seed(0)
    case = small_case(device)
    hidden, weight, bias = (
        torch.randn(shape, generator=g).to(device).requires_grad_()
        for shape in ((9, 6), (50, 6), (50,))
    )
    grads = []
    for inplace in (False, True):
        logits = (hidden @ weight.t() + bias) * 0.7
        loss = case.policy_loss(logits, backend, inplace=inplace).loss
        grads.append(torch.autograd.grad(2.0 * loss, (hidden, weight, bias)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient_the_logits_stay(mode, backend, device):
    case = small_case(device)
    z = case.logits.requires_grad_().mul(1.0)
    before, version = z.detach().clone(), z._version
    with mode():
        case.policy_loss(z, backend, inplace=True)
    assert torch.equal(z.detach(), before)
    assert z._version == version
    constant = case.logits.detach().clone()
    case.policy_loss(constant, backend, inplace=True)
    assert torch.equal(constant, before)


def test_an_unused_loss_gives_no_gradient(backend, device):
    """The loss is not part of what is differentiated: no error, no gradient from it."""
    case = small_case(device)
    leaf = case.logits.requires_grad_()
    hidden = leaf.mul(1.0)
    case.policy_loss(hidden.mul(1.0), backend, inplace=True)
    hidden.sum().backward()
    assert leaf.grad.eq(1).all()
