"""Rows at the ends of what a logit may be: the largest and smallest numbers, masked tokens, common
offsets, tokens that are almost certain, rows without a distribution, targets that are no column. In
every backend the same, and in the oracle."""

from __future__ import annotations

import math

import pytest
import torch

from papo_kernels import Compute, Logits, Objective, PolarityWeighting, token_stats
from papo_kernels.backends import named
from papo_kernels.types import RowParams, TokenInputs, acc_dtype
from tests.cases import make_case, make_loss_case
from tests.oracle import assert_close, check_policy_loss, check_token_stats, plain_token_stats

PARAMS = Objective(clip_high=0.28, dual_clip=1.5, kl_coef=0.04, entropy_coef=0.01)
WEIGHTINGS = {
    "unweighted": None,
    "sign": PolarityWeighting(0.5, 0.7, scale=1.1),
    "tanh": PolarityWeighting(0.5, 0.7, shape="tanh", sigma=0.1, scale=1.1),
}


def lowest(x):
    return torch.finfo(x.dtype).min


EXTREMES = {
    "finfo.min beside ordinary logits": lambda x: x[:, ::2].fill_(lowest(x)),
    "nothing but finfo.min": lambda x: x.fill_(lowest(x)),
    "finfo.min and -inf": lambda x: x.fill_(lowest(x))[:, ::3].fill_(-torch.inf),
    "nothing but finfo.max": lambda x: x.fill_(torch.finfo(x.dtype).max),
    "both ends of the range": lambda x: x.fill_(lowest(x))[:, 5].fill_(torch.finfo(x.dtype).max),
    "a rising row": lambda x: x.copy_(torch.linspace(-6e4, 6e4, x.shape[1]).expand(x.shape)),
}


@pytest.mark.not_for(
    "it scales logits in the accumulation dtype: beyond its range they are masked",
    backend="cpu",
    temperature=1e-3,
)
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("temperature", [1.0, 1e-3, 1e3])
def test_extreme_logits(name, temperature, backend, device, dtypes, sizes):
    """A common offset, however large, leaves log V and the gradient what they are. At 1e-3 the
    scaled logits leave the range of float32."""
    v = sizes(1100, 140)
    for dtype in dtypes[-3:]:
        logits = torch.empty(2, v, dtype=dtype)
        logits.copy_(torch.randn(2, v, generator=torch.Generator().manual_seed(0)))
        EXTREMES[name](logits)
        targets = torch.tensor([5, 5])
        exact = plain_token_stats(logits, targets, temperature=temperature)
        leaf = logits.to(device).requires_grad_()
        actual = token_stats(
            leaf, targets.to(device), temperature=temperature, compute=Compute(backend)
        )
        for x, y in zip(actual, exact, strict=True):
            torch.testing.assert_close(x.cpu(), y.float(), rtol=2e-6, atol=2e-6)
        (dz,) = torch.autograd.grad(sum(x.sum() for x in actual[:3]), leaf)
        assert dz.isfinite().all()
        if name.startswith("nothing but"):
            assert actual.logp.tolist() == pytest.approx([-math.log(v)] * 2)
            # Equal logits: of logp [j = a] - 1/V, of H nothing, of c -1/V times that of logp.
            expected = torch.full((2, v), -1.0 / v, dtype=torch.float64)
            expected[:, 5] += 1.0
            expected *= (1.0 - 1.0 / v) / temperature
            info = torch.finfo(dtype)
            close = {"rtol": max(2e-6, info.eps), "atol": info.smallest_normal * info.eps}
            torch.testing.assert_close(dz.cpu().double(), expected, **close)


@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_all_that_a_bad_row_reports_is_nan(bad, name, backend, device, dtypes, sizes):
    """Its weight too, where there is no weighting; and it alone."""
    n, v = sizes((9, 333), (3, 140))
    for dtype in sizes(dtypes, dtypes[-1:]):
        more = {"dtype": dtype, "device": device}
        case = make_loss_case("normal", n, v, objective=PARAMS, weighting=WEIGHTINGS[name], **more)
        case.targets[1], case.token_weight[1] = 7, 0.1
        case.logits[1, slice(None) if bad == "all -inf" else 40] = float(bad.split()[-1])
        dlogits = check_token_stats(case, backend)
        assert dlogits[1].isnan().all()
        dlogits = check_policy_loss(case, backend)
        assert dlogits[1].isnan().all()
        out = case.policy_loss(case.logits, backend)
        assert all(x[1].isnan() and x[0].isfinite() for x in out[1:-1])
        assert out.clip_side[1] == 0


@pytest.mark.not_for("the check is in front of the backend", backend="cpu")
@pytest.mark.parametrize("target", [-1, -2, 60, 2**40])
def test_a_target_that_is_no_column_makes_its_row_nan(target, backend, device):
    """-1 too, which only a shard of the vocabulary takes to mean elsewhere. (For CPU tensors the
    public functions raise before; the cpu backend counts on it.)"""
    case = make_case("normal", 3, 60, device=device)
    logits, row = case.logits, RowParams(0.9, 0.0, 60)
    targets = torch.tensor([4, target, 59], device=device)
    impl, ones = named(backend), torch.ones(3, device=device)
    *stats, state = impl.token_stats_fwd(logits, targets, row)
    dstats = impl.token_stats_bwd(logits, targets, state, (ones,) * 4, row)
    dloss = torch.empty_like(logits)
    tokens = TokenInputs(ones, ones, None, None)
    *loss, side = impl.policy_loss_fwd(logits, targets, tokens, PARAMS, None, row, dloss)
    for x in (*stats, dstats, *loss, dloss):
        assert x[1].isnan().all()
        assert x[[0, 2]].isfinite().all()
    assert side[1] == 0
    # The state carries it to where the logits are not read again.
    *again, _ = impl.token_stats_fwd(logits, targets, row, state)
    *given, _ = impl.policy_loss_fwd(logits, targets, tokens, PARAMS, None, row, dloss, state)
    for x in (*again, *given, dloss):
        assert x[1].isnan().all()
        assert x[[0, 2]].isfinite().all()


def test_elsewhere_is_for_shards(backend, device):
    """The sampled token in another shard: masked here, and no element of its own."""
    case = make_case("normal", 2, 60, device=device)
    impl, ones = named(backend), torch.ones(2, device=device)
    ones = ones.to(acc_dtype(case.logits.dtype))
    targets, row = torch.tensor([-1, 3], device=device), RowParams(0.9, 0.0, 60, sharded=True)
    *stats, state = impl.token_stats_fwd(case.logits, targets, row)
    assert stats[0][0] == -torch.inf
    assert state[0, 5] == -torch.inf
    assert state[:, :5].isfinite().all()
    state[0, 5] = 0.3
    dz = impl.token_stats_bwd(case.logits, targets, state, (ones, None, None, None), row)
    p = (case.logits[0].double() / 0.9).softmax(0)
    torch.testing.assert_close(dz[0].double(), -p / 0.9, rtol=2e-6, atol=1e-9)


def check_nearly_certain_tokens(backend, device, v):
    """Of the three statistics, the sampled token's own gradient relative to itself: it is made of
    what the others add to a Z and to a Z2 of almost 1. Many rows, as one may be lucky."""
    rows = torch.arange(24)
    for p in (0.9, 0.99, 0.999, 0.9999):
        logits = torch.randn(24, v, generator=torch.Generator().manual_seed(2))
        logits[rows, rows] = -torch.inf
        logits[rows, rows] = (logits.double().logsumexp(1) + math.log(p / (1.0 - p))).float()
        for name in ("logp", "entropy", "unit_polarity"):
            grads = []
            for acc in (torch.float64, torch.float32):
                leaf = logits.to(acc).requires_grad_()
                stats = plain_token_stats(leaf, rows, dtype=acc)
                (dz,) = torch.autograd.grad(getattr(stats, name).sum(), leaf)
                grads.append(dz[rows, rows])
            leaf = logits.to(device).requires_grad_()
            stats = token_stats(leaf, rows.to(device), compute=Compute(backend))
            (dz,) = torch.autograd.grad(getattr(stats, name).sum(), leaf)
            assert_close(f"d{name} at {p}", dz.cpu()[rows, rows], *grads, scale=grads[0].abs())


# ---- masked logits, offsets, certain tokens ------------------------------------------------------


def gradients(logits, targets, backend, softcap=None):
    """Of logp + entropy + unit_polarity over all finite values."""
    z = logits.detach().clone().requires_grad_()
    stats = token_stats(Logits(z, softcap=softcap), targets, compute=Compute(backend))
    total = sum(torch.where(x.isfinite(), x, 0.0).sum() for x in stats[:3])
    return stats, torch.autograd.grad(total, z)[0]


MASKS = {
    "single": lambda z: z[:, 7:8],
    "first": lambda z: z[:, :1],
    "last": lambda z: z[:, -1:],
    "leading_block": lambda z: z[:, : z.shape[1] // 2],
    "trailing_block": lambda z: z[:, z.shape[1] // 2 :],
    "all_but_one": lambda z: z.view(torch.int16)[:, :0],
}


@pytest.mark.parametrize("mask", MASKS)
def test_masked_logits(mask, backend, device, dtypes, sizes):
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


def test_float16_largest_values(backend, device):
    logits = torch.full((3, 40), -65504.0, dtype=torch.float16, device=device)
    logits[1] = 65504.0
    logits[2, 5] = 65504.0
    stats, dlogits = gradients(logits, torch.tensor([0, 1, 5], device=device), backend)
    assert all(x.isfinite().all() for x in (*stats, dlogits))
    torch.testing.assert_close(stats.entropy.cpu(), torch.tensor([math.log(40)] * 2 + [0.0]))


@pytest.mark.parametrize("masked_sampled", [False, True])
def test_whole_parts_masked(masked_sampled, backend, device, sizes):
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


def test_ignored_rows_are_never_read(backend, device):
    """-100 gives 0 and no gradient, even over NaN; its neighbors are as without it."""
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


@pytest.mark.parametrize("kind", ["negative", "offset_up", "offset_down"])
def test_no_reduction_starts_from_zero(kind, backend, device, dtypes, sizes):
    """Rows that lie wholly near -120, -1e4 or 1e4 (verl PR 7439), over several tiles."""
    for dtype in dtypes[-3:-1]:
        case = make_case(kind, sizes(4, 2), sizes(17_000, 4500), dtype=dtype, device=device)
        check_token_stats(case, backend)
        case = make_loss_case(kind, sizes(4, 2), sizes(17_000, 4500), dtype=dtype, device=device)
        check_policy_loss(case, backend)


@pytest.mark.parametrize("offset", [-1e4, -120.0, 120.0, 1e4])
def test_common_offset(offset, backend, device, sizes):
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


@pytest.mark.parametrize("v", [128, 1000, 16_000])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 0.9999])
def test_gradient_of_a_nearly_certain_token(p, v, backend, device, dtypes, sizes):
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


@pytest.mark.parametrize("gap", [50.0, 104.0, 1e3, 1e4, 1e30])
def test_nearly_deterministic_tokens(gap, backend, device):
    logits = torch.zeros(2, 90, device=device)
    logits[:, 4] = gap
    stats, dlogits = gradients(logits, torch.tensor([4, 5], device=device), backend)
    assert stats.logp.tolist() == [0.0, pytest.approx(-gap)]
    assert stats.entropy.abs().max() < 1e-18
    assert stats.unit_polarity.abs().max() < 1e-18
    torch.testing.assert_close(dlogits[0], torch.zeros_like(dlogits[0]), rtol=0, atol=1e-18)
    assert dlogits[1, 5].item() == pytest.approx(1.0)
