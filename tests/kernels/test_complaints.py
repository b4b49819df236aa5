"""What users of other kernels ran into, one test each, numbered as in the list of peers' issues.

Elsewhere: 7 test_autograd; 8, 35, 40 test_memory; 12 test_properties; 14 test_inplace; 19
test_large; 24 test_protocol; 27, 28 test_ops; 30 test_errors. 16, 17, 31, 32, 34 and 37 belong to
the linear entry points; 20, 25 and 26 to CUDA.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from papo_kernels import Compute, Logits, Objective, policy_loss, token_stats
from tests.cases import make_case, make_loss_case
from tests.oracle import (
    assert_close,
    check_policy_loss,
    check_token_stats,
    plain_policy_loss,
    plain_token_stats,
)


def gradients(logits, targets, backend, softcap=None):
    """Of logp + entropy + unit_polarity over all finite values."""
    z = logits.detach().clone().requires_grad_()
    stats = token_stats(Logits(z, softcap), targets, compute=Compute(backend))
    total = sum(torch.where(x.isfinite(), x, 0.0).sum() for x in stats[:3])
    return stats, torch.autograd.grad(total, z)[0]


@pytest.mark.parametrize(("v", "vocab_size"), [(1304, 1300), (151_944, 151_937)])
def test_complaint_01_padded_columns_do_not_enter_the_sums(v, vocab_size, backend, device, sizes):
    """Padding full of large values (verl #2656: logp up to +123)."""
    v, vocab_size = sizes((v, vocab_size), (1304, 1300))
    rows = sizes(64, 8)
    logits = torch.randn(1, v, generator=torch.Generator().manual_seed(0)).to(device)
    logits[:, vocab_size:] = 1e4
    targets = torch.arange(rows, device=device) * (vocab_size // rows)
    stats = token_stats(
        Logits(logits.expand(rows, v), vocab_size=vocab_size), targets, compute=Compute(backend)
    )
    plain = torch.log_softmax(logits[0, :vocab_size].double(), 0)
    assert (stats.logp <= 0).all()
    torch.testing.assert_close(stats.logp.double(), plain[targets], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["negative", "offset_up", "offset_down"])
def test_complaint_02_no_reduction_starts_from_zero(kind, backend, device, dtypes, sizes):
    """Rows that lie wholly near -120, -1e4 or 1e4 (verl PR 7439), over several tiles."""
    for dtype in dtypes[-3:-1]:
        case = make_case(kind, sizes(4, 2), sizes(17_000, 4500), dtype=dtype, device=device)
        check_token_stats(case, backend)
        case = make_loss_case(kind, sizes(4, 2), sizes(17_000, 4500), dtype=dtype, device=device)
        check_policy_loss(case, backend)


@pytest.mark.parametrize("offset", [-1e4, -120.0, 120.0, 1e4])
def test_complaint_03_common_offset(offset, backend, device, sizes):
    """A shift that is exact in the dtype changes no statistic and no gradient beyond rounding."""
    for dtype in (torch.float32, torch.bfloat16):
        unit = 64.0 if dtype == torch.bfloat16 else 2.0**-8
        offset = round(offset / unit) * unit
        g = torch.Generator().manual_seed(1)
        logits = (
            torch.randint(-1024, 1024, (sizes(6, 2), 333), generator=g).to(device, dtype) * 2.0**-8
        )
        if dtype == torch.bfloat16:
            logits = torch.where(logits > 3.0, 0.0, -unit).to(dtype)
        targets = torch.arange(len(logits), device=device)
        assert (logits + offset - offset).equal(logits)
        here, dz_here = gradients(logits, targets, backend)
        there, dz_there = gradients(logits + offset, targets, backend)
        for a, b in zip((*here[:3], dz_here), (*there[:3], dz_there), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


MASKS = {
    "single": lambda z: z[:, 7:8],
    "first": lambda z: z[:, :1],
    "last": lambda z: z[:, -1:],
    "leading_block": lambda z: z[:, : z.shape[1] // 2],
    "trailing_block": lambda z: z[:, z.shape[1] // 2 :],
    "all_but_one": lambda z: z.view(torch.int16)[:, :0],
}


@pytest.mark.parametrize("mask", MASKS)
def test_complaints_04_05_masked_logits(mask, backend, device, dtypes, sizes):
    """-inf gives p = 0, finite statistics, and a gradient that is finite and 0 there, not NaN."""
    # Half of it spans whole chunks of the CPU, whole tiles of a GPU.
    n, v = sizes((2, 40_000), (1, 5000))
    for dtype in sizes(dtypes[-3:], dtypes[:1]):
        case = make_case("normal", n, v, dtype=dtype, device=device)
        targets = torch.full((n,), v // 2 - 1 if mask == "trailing_block" else v // 2).to(device)
        if mask == "all_but_one":
            kept = case.logits[:, v // 2].clone()
            case.logits.fill_(-torch.inf)[:, v // 2] = kept
        else:
            MASKS[mask](case.logits).fill_(-torch.inf)
        case.targets.copy_(targets)
        for softcap in (None, 20.0):
            stats, dlogits = gradients(case.logits, targets, backend, softcap=softcap)
            assert all(x.isfinite().all() for x in (*stats, dlogits))
            assert dlogits[case.logits.isneginf()].eq(0).all()
        check_token_stats(case, backend)


def test_complaint_04_float16_largest_values(backend, device):
    logits = torch.full((3, 40), -65504.0, dtype=torch.float16, device=device)
    logits[1] = 65504.0
    logits[2, 5] = 65504.0
    stats, dlogits = gradients(logits, torch.tensor([0, 1, 5], device=device), backend)
    assert all(x.isfinite().all() for x in (*stats, dlogits))
    torch.testing.assert_close(stats.entropy.cpu(), torch.tensor([math.log(40)] * 2 + [0.0]))


@pytest.mark.parametrize("masked_sampled", [False, True])
def test_complaint_06_whole_parts_masked(masked_sampled, backend, device, sizes):
    """Whole chunks of -inf, leading, between and trailing, as a padded shard would be."""
    v, step = sizes((70_000, 20_000), (9000, 2500))
    logits = torch.full((1, v), -torch.inf, device=device)
    logits[0, step : step + 50] = torch.linspace(-2.0, 2.0, 50, device=device)
    logits[0, 2 * step] = 1.0
    targets = torch.tensor([v - 1 if masked_sampled else step + 3], device=device)
    stats, dlogits = gradients(logits, targets, backend)
    exact = plain_token_stats(logits, targets)
    for name in ("logp", "entropy", "unit_polarity", "lse"):
        torch.testing.assert_close(
            getattr(stats, name).double(), getattr(exact, name), rtol=2e-6, atol=2e-6
        )
    assert dlogits.isfinite().all()
    if masked_sampled:
        assert stats.logp.item() == -math.inf
        assert dlogits.eq(0).all()


def test_complaint_09_packed_next_token_labels(backend, device):
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


def test_complaint_10_the_ratio_scales_the_gradient(backend, device):
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
def test_complaint_11_the_normaliser_is_an_argument(backend, device):
    """Token mean, sequence mean and constant length differ by token_weight only."""
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 8, 40, generator=g).to(device)
    targets = torch.randint(40, (3, 8), generator=g).to(device)
    advantages = torch.randn(3, 1, generator=g).expand(3, 8).to(device)
    mask = (torch.arange(8) < torch.tensor([[8], [3], [5]])).float().to(device)
    old_logp = token_stats(logits, targets, compute=Compute("reference")).logp - 0.1
    ratio = math.exp(0.1)
    normalisers = {
        "token": (mask / mask.sum(), ((-ratio * advantages) * mask).sum() / mask.sum()),
        "sequence": (
            mask / mask.sum(1, keepdim=True) / 3,
            (((-ratio * advantages) * mask).sum(1) / mask.sum(1)).mean(),
        ),
        "constant": (mask / (3 * 8), ((-ratio * advantages) * mask).sum() / 24),
    }
    for weight, expected in normalisers.values():
        out = policy_loss(
            logits, targets, advantages, weight, old_logp=old_logp, compute=Compute(backend)
        )
        torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)


def test_complaint_13_any_upstream_gradient_per_token(backend, device, sizes):
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


@pytest.mark.parametrize("v", [128, 1000, 16_000])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 0.9999])
def test_complaint_15_gradient_of_a_nearly_certain_token(p, v, backend, device, dtypes, sizes):
    """Relative to 1 - p_a, which a bfloat16 p_a would round to 0 at 0.999 (Liger PR 1329)."""
    n, v = sizes((24, v), (24 if v == 128 else 4, min(v, 2000)))
    rows = torch.arange(24, device=device)
    at = (rows, rows)
    for dtype in sizes(dtypes[-3:], dtypes[:1]):
        logits = torch.randn(24, v, generator=torch.Generator().manual_seed(2)).to(device, dtype)
        logits[at] = -torch.inf
        logits[at] = (logits.double().logsumexp(1) + math.log(p / (1.0 - p))).to(dtype)
        grads = []
        for acc in (torch.float64, torch.float32):
            leaf = logits.detach().to(acc).clone().requires_grad_()
            plain_token_stats(leaf, rows, dtype=acc).logp.sum().backward()
            grads.append(leaf.grad[at])
        leaf = logits[:n].requires_grad_()
        (dz,) = torch.autograd.grad(
            token_stats(leaf, rows[:n], compute=Compute(backend)).logp.sum(), leaf
        )
        # Where fewer rows are run, plain torch is still judged by all of them.
        actual = grads[0].to(dtype)
        actual[:n] = dz[at[0][:n], at[1][:n]]
        assert_close("1 - p_a", actual, *grads, scale=grads[0].abs())


def test_complaint_18_logits_of_magnitude_100(backend, device, dtypes, sizes):
    """Results are float32 whatever the logits, with no narrow staging on the way."""
    for dtype in dtypes[-3:]:
        case = make_case("normal", sizes(16, 3), 500, dtype=dtype, device=device)
        case.logits.mul_(30.0)
        check_token_stats(case, backend)
        assert all(x.dtype == torch.float32 for x in case.token_stats(case.logits, backend))


@pytest.mark.plumbing
def test_complaint_21_more_rows_than_a_grid_dimension_holds(backend, device):
    """65,536 and more rows; the last ones are checked one by one."""
    n, v = 131_073, 5
    logits = torch.randn(n, v, generator=torch.Generator().manual_seed(6)).to(device)
    targets = torch.arange(n, device=device) % v
    z = logits.requires_grad_()
    stats = token_stats(z, targets, compute=Compute(backend))
    exact = plain_token_stats(logits.detach(), targets)
    for a, b in zip(stats, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)
    (dz,) = torch.autograd.grad(stats.logp.sum(), z)
    assert dz.sum(1).abs().max() < 1e-6
    assert dz[-1].abs().max() > 1e-3


@pytest.mark.parametrize("v", [151_936, 201_088, 248_320, 262_144])
def test_complaint_22_large_vocabularies(v, backend, device, sizes):
    v = sizes(v, v // 16)
    case = make_loss_case("normal", 2, v, dtype=torch.bfloat16, device=device)
    check_policy_loss(case, backend)


def test_complaint_23_entropy_of_262144_equal_logits(backend, device, dtypes, sizes):
    v = sizes(262_144, 32_768)
    for dtype in dtypes[-3:]:
        logits = torch.full((1, v), 0.5, dtype=dtype, device=device)
        stats = token_stats(logits, torch.tensor([v - 1], device=device), compute=Compute(backend))
        assert stats.entropy.item() == pytest.approx(math.log(v), abs=1e-5)
        assert stats.logp.item() == pytest.approx(-math.log(v), abs=1e-5)
        assert abs(stats.unit_polarity.item()) < 1e-10


@pytest.mark.parametrize("softcap", [0.5, 15.0, 30.0, 50.0])
def test_complaint_29_softcap_is_that_of_transformers(softcap, backend, device):
    """Gemma's own lines: logits / cap, tanh, * cap; from far below to far above the cap."""
    z = torch.linspace(-8.0 * softcap, 8.0 * softcap, 101, device=device)[None]
    capped = z.double() / softcap
    capped = torch.tanh(capped) * softcap
    for target in (0, 50, 75, 100):
        stats = token_stats(
            Logits(z, softcap=softcap),
            torch.tensor([target], device=device),
            compute=Compute(backend),
        )
        expected = torch.log_softmax(capped, -1)[0, target].item()
        assert stats.logp.item() == pytest.approx(expected, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("gap", [50.0, 104.0, 1e3, 1e4, 1e30])
def test_complaint_33_nearly_deterministic_tokens(gap, backend, device):
    logits = torch.zeros(2, 90, device=device)
    logits[:, 4] = gap
    stats, dlogits = gradients(logits, torch.tensor([4, 5], device=device), backend)
    assert stats.logp.tolist() == [0.0, pytest.approx(-gap)]
    assert stats.entropy.abs().max() < 1e-18
    assert stats.unit_polarity.abs().max() < 1e-18
    torch.testing.assert_close(dlogits[0], torch.zeros_like(dlogits[0]), rtol=0, atol=1e-18)
    assert dlogits[1, 5].item() == pytest.approx(1.0)


@pytest.mark.parametrize("v", range(1, 18))
def test_complaint_38_tiny_vocabularies_with_and_without_grad(v, backend, device, sizes):
    n = sizes(4, 1)
    check_token_stats(make_case("normal", n, v, device=device), backend)
    case = make_loss_case("normal", n, v, device=device, objective=Objective(entropy_coef=0.1))
    check_policy_loss(case, backend)
    with torch.no_grad():
        out = case.policy_loss(case.logits, backend)
    expected = plain_policy_loss(case).loss
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert not out.loss.requires_grad


def test_complaint_39_import_needs_no_gpu_no_triton_and_no_extension():
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


def test_complaint_41_ignored_rows_are_never_read(backend, device):
    """-100 gives 0 and no gradient, even over NaN; its neighbours are as without it."""
    case = make_case("normal", 9, 70, device=device)
    clean = case.token_stats(case.logits, backend)
    poisoned = case.logits.clone()
    poisoned[case.targets == -100] = torch.nan
    z = poisoned.requires_grad_()
    stats = case.token_stats(z, backend)
    assert all(torch.equal(a, b) for a, b in zip(clean, stats, strict=True))
    ignored = case.targets == -100
    assert ignored.any()
    assert all(x[ignored].eq(0).all() for x in stats)
    (dz,) = torch.autograd.grad(sum(x.sum() for x in stats[:3]), z)
    assert dz[ignored].eq(0).all()
    assert dz.isfinite().all()


def test_complaint_42_dtype_of_the_results(backend, device, dtypes):
    for dtype in dtypes:
        case = make_loss_case("normal", 3, 20, dtype=dtype, device=device)
        want = torch.float64 if dtype == torch.float64 else torch.float32
        out = case.policy_loss(case.logits, backend)
        assert {x.dtype for x in case.token_stats(case.logits, backend)} == {want}
        assert {x.dtype for x in out[:-1]} == {want}
        assert out.clipped.dtype == torch.bool
