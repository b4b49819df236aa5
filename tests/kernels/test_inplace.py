"""`Compute(inplace=True)`: the gradient takes the logits' storage, and every misuse is refused;
peers corrupt other gradients silently."""

from __future__ import annotations

import pytest
import torch

from papo_kernels import Compute, Objective, PolarityWeighting, policy_loss
from tests.cases import make_loss_case
from tests.oracle import check_policy_loss

pytestmark = [pytest.mark.usefixtures("path"), pytest.mark.plumbing]
CLIPPED = Objective(clip_high=0.28, entropy_coef=0.01)
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


# The views that a model's logits [3, 6, 50] are passed as, none of which need be copied.
VIEWS = {
    "flat": lambda z: z.view(-1, 50),
    "shifted": lambda z: z[:, :-1],
    "one": lambda z: z[1],
    "every_other": lambda z: z[:, 1::2],
    "transposed": lambda z: z.transpose(0, 1),
}


def viewed(view, device):
    """A case of the view's shape, and the leaf and what is computed of it."""
    g = torch.Generator().manual_seed(0)
    leaf = torch.randn(3, 6, 50, generator=g).to(device).requires_grad_()
    z = leaf.mul(1.0)
    logits = VIEWS[view](z)
    case = make_loss_case("normal", logits[..., 0].numel(), 50, device=device)
    names = ("targets", "advantages", "token_weight", "old_logp")
    targets, *inputs, old_logp = (
        getattr(case, name).view(logits.shape[:-1]).clone() for name in names
    )
    targets.view(-1)[2] = -100
    return (targets, *inputs), {"old_logp": old_logp, "objective": CLIPPED}, leaf, z, logits


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_whole_rows(view, backend, device):
    """The results of the same call out of place, and a gradient that no copy was made for."""
    inputs, named, leaf, z, logits = viewed(view, device)
    expected = policy_loss(logits, *inputs, **named, compute=Compute(backend))
    (wanted,) = torch.autograd.grad(expected.loss, leaf)
    _, _, leaf, z, _ = viewed(view, device)
    seen: list[int] = []
    z = _Recorder.apply(leaf, seen)
    before = z.data_ptr()
    out = policy_loss(VIEWS[view](z), *inputs, **named, compute=Compute(backend, inplace=True))
    for a, b in zip(out[1:], expected[1:], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(out.loss, expected.loss)
    (dz,) = torch.autograd.grad(out.loss, leaf)
    assert torch.equal(dz, wanted)
    assert seen == [before]


@pytest.mark.parametrize("view", VIEWS)
def test_misuse_of_a_view(view, backend, device):
    """What uses the same memory before or after is refused, by any name, and so is a second
    backward."""
    compute = Compute(backend, inplace=True)
    for use in (lambda z, logits: z, lambda z, logits: logits, lambda z, logits: z[0]):
        inputs, named, leaf, z, logits = viewed(view, device)
        before = use(z, logits).tanh().sum() + use(z, logits).exp().sum()
        loss = policy_loss(logits, *inputs, **named, compute=compute).loss
        torch.autograd.grad(before, leaf)  # exp and tanh save their results, not the logits
        with pytest.raises(RuntimeError, match="overwrote the logits"):
            (loss + use(z, logits).sum()).backward()
        inputs, named, leaf, z, logits = viewed(view, device)
        before = use(z, logits).square().sum()
        loss = policy_loss(logits, *inputs, **named, compute=compute).loss
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (before + loss).backward()
    inputs, named, leaf, z, logits = viewed(view, device)
    loss = policy_loss(logits, *inputs, **named, compute=compute).loss
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, leaf)


class _Passed(torch.autograd.Function):
    """A view whose gradient is not the base's, as a module's hooks return it."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 2.0 * grad


def hooked(view):
    view.register_hook(lambda grad: 2.0 * grad)
    return view


def retained(view):
    view.retain_grad()
    return view


UNSAFE_VIEWS = {
    "columns": (lambda leaf: (leaf * 1.0)[:, :50], r"whole rows .*Logits\(logits, vocab_size=.*"),
    "shifted_columns": (lambda leaf: (leaf * 1.0).view(18, 50)[:, 1:], r"whole rows"),
    "repeated": (lambda leaf: (leaf * 1.0).view(18, 50)[:1].expand(9, 50), r"ExpandBackward"),
    "strided": (lambda leaf: (leaf * 1.0).t().t()[:, ::2], r"whole rows"),
    "view_of_a_view": (lambda leaf: (leaf * 1.0).view(9, 100)[:5], r"view of a view"),
    "leaf": (lambda leaf: leaf.view(18, 50)[:9], r"view of a leaf"),
    "function": (lambda leaf: _Passed.apply(leaf * 1.0).view(18, 50), r"got _PassedBackward"),
    "hook": (lambda leaf: hooked((leaf * 1.0).view(18, 50)), r"a view with a hook"),
    "retained": (
        lambda leaf: retained((leaf * 1.0).view(18, 50)),
        r"logits that retain their gradient",
    ),
}


@pytest.mark.parametrize("view", UNSAFE_VIEWS)
def test_views_that_are_refused(view, backend, device):
    """Their gradient is not that of whole rows; nothing is written before the error."""
    make, message = UNSAFE_VIEWS[view]
    leaf = torch.ones(9, 100, device=device).requires_grad_()
    logits = make(leaf)
    inputs = [torch.zeros(len(logits), device=device) for _ in range(2)]
    targets = torch.zeros(len(logits), dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=rf"inplace: expected False for .*{message}"):
        policy_loss(logits, targets, *inputs, compute=Compute(backend, inplace=True))
    assert logits.eq(1.0).all()


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
