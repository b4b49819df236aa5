"""More than 2^31 logits. `pytest -m large`: 4.3 GB in half precision, twice that in
backward; interpreted kernels would take hours."""

from __future__ import annotations

import pytest
import torch

from papo_kernels import Compute, policy_loss, token_stats
from tests.cases import make_loss_case

pytestmark = pytest.mark.large

BLOCK = 16
# N V just over 2^31: the last row lies beyond what 32 bits address.
SHAPES = [(16_400, 131_072), (8_208, 262_144)]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def case(request, backend, device):
    """Few rows, repeated: every repetition must give what the few give, bit for bit."""
    if backend == "reference":
        return None  # its dense float64 temporaries take 17 GB each
    n, v = request.param
    assert n * v > 2**31
    few = make_loss_case("normal", BLOCK, v, dtype=torch.bfloat16, device=device)
    logits = few.logits.expand(n // BLOCK, BLOCK, v).reshape(n, v)
    return few, logits


def repeated(x, n):
    return x.repeat(n // BLOCK)


def same(actual, few):
    rows = actual.view(-1, *few.shape)
    return bool((rows == few).all())


def test_statistics_of_more_than_2_to_the_31_logits(case, backend):
    if case is None:
        return
    few, logits = case
    n = len(logits)
    small = few.logits.requires_grad_()
    expected = few.token_stats(small, backend)
    large = logits.requires_grad_()
    stats = token_stats(large, repeated(few.targets, n), compute=Compute(backend))
    assert all(same(a, b) for a, b in zip(stats, expected, strict=True))
    (dz,) = torch.autograd.grad(stats.logp.sum() + stats.unit_polarity.sum(), large)
    (want,) = torch.autograd.grad(expected.logp.sum() + expected.unit_polarity.sum(), small)
    assert same(dz, want)


def test_loss_in_place_over_more_than_2_to_the_31_logits(case, backend):
    if case is None:
        return
    few, logits = case
    n = len(logits)
    small = few.logits.requires_grad_()
    expected = few.policy_loss(small, backend)
    (want,) = torch.autograd.grad(expected.loss, small)
    carrier = torch.zeros((), dtype=logits.dtype, device=logits.device, requires_grad=True)
    large = logits.add_(carrier)  # not a leaf, and no second copy
    out = policy_loss(
        large,
        *(repeated(x, n) for x in (few.targets, few.advantages, few.token_weight)),
        old_logp=repeated(few.old_logp, n),
        compute=Compute(backend, inplace=True),
    )
    for a, b in zip(out[1:], expected[1:], strict=True):
        assert same(a, b)
    assert same(large.detach(), want)
