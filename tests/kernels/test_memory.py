"""What is allocated and what is kept: no temporary as wide as the vocabulary, nothing pinned."""

from __future__ import annotations

import weakref

import pytest
import torch

from papo_kernels import Objective, PolarityWeighting
from tests.cases import make_loss_case

pytestmark = pytest.mark.plumbing
N, V = 16, 40_000  # [16, 40000] float32: 2.4 MiB, and float64 temporaries would show at once
SLACK = 64 * 1024


def peak(run, device):
    """Bytes that `run()` holds at most beyond what was there; its result is kept to the end."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        # Bytes as requested: the allocator's blocks may be larger than what is asked of them.
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before, result
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = run()
    events = profiler.profiler.kineto_results.events()
    allocations = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    held = most = 0
    for _, nbytes in allocations:
        held += nbytes
        most = max(most, held)
    return most, result


@pytest.fixture
def slack(backend, device):
    """Bytes of a call that are not as wide as the vocabulary.

    On a GPU 16 rows are too few to fill it, and Triton splits them: the states of the parts of a
    row are 5 sums of 256 lanes for each segment of 4096 words and for the rest of the row, and the
    target's logit for 256 lanes. In float32 that is (5 * (3 + 1) + 1) * 256 * 4 bytes, 336 KiB in
    16 rows.
    """
    splits_rows = backend == "triton" and device == "cuda"
    return SLACK + (512 * 1024 if splits_rows else 0)


class _Model(torch.autograd.Function):
    """What precedes the logits in a model, with a backward pass that allocates nothing."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.fixture
def case(backend, device):
    objective = Objective(clip_high=0.28, kl_coef=0.04, entropy_coef=0.01)
    weighting = PolarityWeighting(0.5, 0.5)
    return make_loss_case("normal", N, V, device=device, objective=objective, weighting=weighting)


def test_the_meter_sees_a_temporary(case, device):
    """Or the bounds below would hold for nothing."""
    used, _ = peak(lambda: case.logits.exp().sum(), device)
    assert used >= case.logits.nbytes


def test_statistics_allocate_nothing_wide(backend, device, case, slack):
    """Forward: per-token outputs only. Backward: the gradient, and for logp alone no more."""
    if backend == "reference":
        return  # the oracle is dense by design
    leaf = case.logits.requires_grad_()
    used, stats = peak(lambda: case.token_stats(leaf, backend), device)
    assert used < slack
    assert leaf.nbytes > 1.3 * slack
    for values in (stats[:1], stats[:3]):
        total = sum(x.sum() for x in values)
        used, _ = peak(lambda t=total: torch.autograd.grad(t, leaf, retain_graph=True), device)
        assert leaf.nbytes <= used < leaf.nbytes + slack


def test_the_loss_in_place_allocates_nothing_wide(backend, device, case, slack):
    if backend == "reference":
        return
    leaf = case.logits.requires_grad_()
    z = _Model.apply(leaf)
    used, _ = peak(
        lambda: (1.5 * case.policy_loss(z, backend, inplace=True).loss).backward(), device
    )
    assert used < slack
    used, _ = peak(lambda: torch.autograd.grad(case.policy_loss(leaf, backend).loss, leaf), device)
    assert leaf.nbytes <= used < leaf.nbytes + slack
    with torch.no_grad():
        used, _ = peak(lambda: case.policy_loss(leaf, backend), device)
    assert used < slack


def test_half_precision_is_not_widened(backend, device, case, slack):
    """No float32 copy of bfloat16 logits."""
    if backend == "reference":
        return
    leaf = case.logits.bfloat16().requires_grad_()
    used, stats = peak(lambda: case.token_stats(leaf, backend), device)
    assert used < slack
    total = stats.logp.sum()
    used, _ = peak(lambda: torch.autograd.grad(total, leaf), device)
    assert used < leaf.nbytes + slack


def test_rows_of_a_wider_buffer_are_not_copied(backend, device, case, slack):
    """Any row stride is read in place; columns of another stride cost a copy."""
    if backend == "reference":
        return
    n, v = case.logits.shape
    wide = torch.zeros(n, v + 24, device=device)[:, 8 : v + 8].copy_(case.logits)
    used, _ = peak(lambda: case.token_stats(wide, backend), device)
    assert used < slack
    used, _ = peak(lambda: case.token_stats(torch.stack([wide, wide], 2)[..., 0], backend), device)
    assert used > case.logits.nbytes


def saved_by(run):
    """What autograd keeps of `run()`, once per storage."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return list(kept.values()), result


def test_what_is_saved_for_backward(backend, device, case):
    """The statistics keep the logits themselves; the loss keeps its gradient and not the logits."""
    leaf = case.logits.requires_grad_()
    saved, _ = saved_by(lambda: case.token_stats(leaf, backend))
    wide = [x for x in saved if x.numel() >= leaf.numel()]
    assert [x.untyped_storage().data_ptr() for x in wide] == [leaf.untyped_storage().data_ptr()]
    saved, _ = saved_by(lambda: case.policy_loss(leaf, backend))
    wide = [x for x in saved if x.numel() >= leaf.numel()]
    assert len(wide) == 1
    assert wide[0].untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()
    z = leaf.mul(1.0)
    saved, _ = saved_by(lambda: case.policy_loss(z, backend, inplace=True))
    wide = [x for x in saved if x.numel() >= leaf.numel()]
    assert [x.untyped_storage().data_ptr() for x in wide] == [z.untyped_storage().data_ptr()]


def test_the_loss_does_not_pin_the_logits(backend, device, case):
    leaf = case.logits.requires_grad_()
    z = leaf.mul(1.0)
    loss = case.policy_loss(z, backend).loss
    alive = weakref.ref(z)
    del z
    assert alive() is None
    loss.backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_stays_after_backward(inplace, backend, device, case):
    """The outputs that a trainer keeps for its metrics hold no graph and no logits."""
    leaf = case.logits.requires_grad_()
    z = leaf.mul(1.0)
    alive = weakref.ref(z)
    out = case.policy_loss(z, backend, inplace=inplace)
    stats = case.token_stats(leaf.mul(1.0), backend) if not inplace else None
    out.loss.backward()
    metrics = [x.detach() for x in (out.loss, *out[1:])]
    del z, out, stats
    assert alive() is None
    assert all(x.grad_fn is None for x in metrics)
