"""What the functions promise a caller: which arguments mean what, and what comes back."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from papo_kernels import Compute, Objective, policy_loss, token_stats
from tests.cases import make_case, make_loss_case


def test_packed_next_token_labels(backend, device):
    """Two packed sequences, logits[:, :-1] against labels[:, 1:], the seam ignored."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 12, 50, generator=g).to(device)
    labels = torch.randint(50, (1, 12), generator=g).to(device)
    labels[0, 5] = -100
    logp = token_stats(logits[:, :-1], labels[:, 1:], compute=Compute(backend)).logp
    eager = torch.log_softmax(logits.double(), -1)
    for t in range(11):
        label = int(labels[0, t + 1])
        expected = 0.0 if label == -100 else eager[0, t, label].item()
        assert logp[0, t].item() == pytest.approx(expected, abs=2e-6)


def test_the_ratio_scales_the_gradient(backend, device):
    """A ratio that is dropped shows as a gradient that ignores old_logp (Liger #1082)."""
    case = make_loss_case("normal", 8, 60, device=device, objective=Objective(1.0, math.inf))
    logits = case.logits.requires_grad_()
    grads = []
    for shift in (0.0, math.log(3.0)):
        out = policy_loss(
            logits,
            case.targets,
            case.advantages,
            case.token_weight,
            old_logp=case.old_logp - shift,
            objective=case.objective,
            compute=Compute(backend),
        )
        grads.append(torch.autograd.grad(out.loss, logits)[0])
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(3.0 * grads[0], grads[1], rtol=2e-5, atol=1e-7)
    with pytest.raises(TypeError, match="old_logps"):
        policy_loss(logits, case.targets, case.advantages, case.token_weight, old_logps=None)


@pytest.mark.plumbing
def test_the_normalizer_is_an_argument(backend, device):
    """Token mean, sequence mean and constant length differ by token_weight only."""
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 8, 40, generator=g).to(device)
    targets = torch.randint(40, (3, 8), generator=g).to(device)
    advantages = torch.randn(3, 1, generator=g).expand(3, 8).to(device)
    mask = (torch.arange(8) < torch.tensor([[8], [3], [5]])).float().to(device)
    old_logp = token_stats(logits, targets, compute=Compute("reference")).logp - 0.1
    ratio = math.exp(0.1)
    normalizers = {
        "token": (mask / mask.sum(), ((-ratio * advantages) * mask).sum() / mask.sum()),
        "sequence": (
            mask / mask.sum(1, keepdim=True) / 3,
            (((-ratio * advantages) * mask).sum(1) / mask.sum(1)).mean(),
        ),
        "constant": (mask / (3 * 8), ((-ratio * advantages) * mask).sum() / 24),
    }
    for weight, expected in normalizers.values():
        how = {"old_logp": old_logp, "compute": Compute(backend)}
        out = policy_loss(logits, targets, advantages, weight, **how)
        torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)


def test_any_upstream_gradient_per_token(backend, device, sizes):
    """Random, zero and ignored rows in one call: each row scales by its own upstream only."""
    n = sizes(14, 7)
    case = make_case("normal", n, 99, device=device)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(5)).to(device)
    upstream[::4] = 0.0
    logits = case.logits.requires_grad_()
    for name in ("logp", "entropy", "unit_polarity"):
        value = getattr(case.token_stats(logits, backend), name)
        (ones,) = torch.autograd.grad(value, logits, torch.ones_like(value), retain_graph=True)
        (mixed,) = torch.autograd.grad(value, logits, upstream)
        expected = ones * upstream[:, None]
        # Where an element's terms cancel, what is left is rounded as they were: two units in the
        # last place of the row's largest.
        allowed = 2e-6 * expected.abs() + 2.4e-7 * expected.abs().amax(1, keepdim=True)
        assert ((mixed - expected).abs() <= allowed).all()
        assert mixed[::4].eq(0).all()
        assert mixed[case.targets == -100].eq(0).all()
        assert ones[6].ne(0).all()


def test_dtype_of_the_results(backend, device, dtypes):
    for dtype in dtypes:
        case = make_loss_case("normal", 3, 20, dtype=dtype, device=device)
        want = torch.float64 if dtype == torch.float64 else torch.float32
        out = case.policy_loss(case.logits, backend)
        assert {x.dtype for x in case.token_stats(case.logits, backend)} == {want}
        assert {x.dtype for x in out[:-1]} == {want}
        assert out.clipped.dtype == torch.bool


@pytest.mark.plumbing
def test_inputs_that_broadcast(backend, device):
    """[B], [B, 1], [1, T] and [] stand for [B, T], in any real dtype; other shapes are refused."""
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(3, 4, 11, generator=g).to(device)
    targets = torch.randint(11, (3, 4), generator=g).to(device)
    full = torch.randn(3, 1, generator=g).expand(3, 4).to(device)
    ones = torch.ones(3, 4, device=device)
    compute = Compute(backend)
    expected = policy_loss(logits, targets, full, ones, temperature=0.7, compute=compute)
    for advantages, weight, temperature in (
        (full[:, 0], ones.bool(), np.float32(0.7)),
        (full[:, :1].double(), ones[:1].long(), torch.tensor(0.7, device=device)),
        (full, torch.tensor(1, device=device), torch.full((3, 1), 0.7, device=device)),
    ):
        got = policy_loss(
            logits, targets, advantages, weight, temperature=temperature, compute=compute
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"advantages: expected shape \(3, 4\) .* got \(4,\)"):
        policy_loss(logits, targets, full[0], ones)


def test_a_temperature_for_each_row(backend, device):
    """That of an ignored row is not read."""
    g = torch.Generator().manual_seed(8)
    logits = torch.randn(3, 11, generator=g).to(device)
    targets = torch.tensor([1, -100, 5], device=device)
    temperature = torch.tensor([0.5, 0.0, 2.0], device=device)
    got = token_stats(logits, targets, temperature=temperature, compute=Compute(backend))
    for i in (0, 2):
        one = token_stats(
            logits[i], targets[i], temperature=temperature[i].item(), compute=Compute(backend)
        )
        for a, b in zip(got, one, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-5, atol=1e-6)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"temperature: .* got 0\.0 at flat position 1"):
            token_stats(logits, targets.clamp(min=0), temperature=temperature)


def test_import_needs_no_gpu_no_triton_and_no_extension():
    code = """
import sys
sys.modules["triton"] = None          # as if not installed
sys.modules["papo_kernels._C"] = None
import torch
from papo_kernels import token_stats
assert not any(name.startswith("triton") for name in sys.modules if sys.modules[name])
stats = token_stats(torch.zeros(1, 4), torch.tensor([1]))
assert abs(stats.entropy.item() - 1.3863) < 1e-3
"""
    environment = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
