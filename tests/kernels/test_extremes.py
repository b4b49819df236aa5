"""Rows at the ends of what a logit may be: the largest and smallest numbers, rows without a
distribution, targets that are no column. In every backend the same, and in the oracle."""

from __future__ import annotations

import math

import pytest
import torch

from papo_kernels import PolarityWeighting, PolicyLossParams, token_stats
from papo_kernels.backends import choice as backends
from papo_kernels.types import RowParams, TokenInputs, acc_dtype
from tests.cases import make_case, make_loss_case
from tests.oracle import assert_close, check_policy_loss, check_token_stats, plain_token_stats

PARAMS = PolicyLossParams(clip_high=0.28, dual_clip=1.5, kl_coef=0.04, entropy_coef=0.01)
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


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("temperature", [1.0, 1e-3, 1e3])
def test_extreme_logits(name, temperature, backend, device, dtypes, sizes):
    """A common offset, however large, leaves log V and the gradient what they are. At 1e-3 the
    scaled logits leave the range of float32."""
    if backend == "cpu" and temperature < 1.0:
        pytest.skip("it scales logits in the accumulation dtype: beyond its range they are masked")
    v = sizes(1100, 140)
    for dtype in dtypes[-3:]:
        logits = torch.empty(2, v, dtype=dtype)
        logits.copy_(torch.randn(2, v, generator=torch.Generator().manual_seed(0)))
        EXTREMES[name](logits)
        targets = torch.tensor([5, 5])
        exact = plain_token_stats(logits, targets, temperature=temperature)
        leaf = logits.to(device).requires_grad_()
        actual = token_stats(leaf, targets.to(device), temperature=temperature, backend=backend)
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
        case = make_loss_case("normal", n, v, params=PARAMS, weighting=WEIGHTINGS[name], **more)
        case.targets[1], case.token_weight[1] = 7, 0.1
        case.logits[1, slice(None) if bad == "all -inf" else 40] = float(bad.split()[-1])
        dlogits = check_token_stats(case, backend)
        assert dlogits[1].isnan().all()
        dlogits = check_policy_loss(case, backend)
        assert dlogits[1].isnan().all()
        out = case.policy_loss(case.logits, backend)
        assert all(x[1].isnan() and x[0].isfinite() for x in out[1:-1])
        assert not out.clipped[1]


@pytest.mark.parametrize("target", [-1, -2, 60, 2**40])
def test_a_target_that_is_no_column_makes_its_row_nan(target, backend, device):
    """-1 too, which only a shard of the vocabulary takes to mean elsewhere. (For CPU tensors the
    public functions raise before; the cpu backend counts on it.)"""
    if backend == "cpu":
        pytest.skip("the check is in front of the backend")
    case = make_case("normal", 3, 60, device=device)
    logits, row = case.logits, RowParams(0.9, 0.0, 60)
    targets = torch.tensor([4, target, 59], device=device)
    impl, ones = backends.module(backend), torch.ones(3, device=device)
    *stats, state = impl.token_stats_fwd(logits, targets, row)
    dstats = impl.token_stats_bwd(logits, targets, state, (ones, ones, ones), row)
    dloss = torch.empty_like(logits)
    tokens = TokenInputs(ones, ones, None, None)
    *loss, clipped = impl.policy_loss_fwd(logits, targets, tokens, PARAMS, None, row, dloss)
    for x in (*stats, dstats, *loss, dloss):
        assert x[1].isnan().all()
        assert x[[0, 2]].isfinite().all()
    assert not clipped[1]
    # The state carries it to where the logits are not read again.
    *again, _ = impl.token_stats_fwd(logits, targets, row, state)
    *given, _ = impl.policy_loss_fwd(logits, targets, tokens, PARAMS, None, row, dloss, state)
    for x in (*again, *given, dloss):
        assert x[1].isnan().all()
        assert x[[0, 2]].isfinite().all()


def test_elsewhere_is_for_shards(backend, device):
    """The sampled token in another shard: masked here, and no element of its own."""
    case = make_case("normal", 2, 60, device=device)
    impl, ones = backends.module(backend), torch.ones(2, device=device)
    ones = ones.to(acc_dtype(case.logits.dtype))
    targets, row = torch.tensor([-1, 3], device=device), RowParams(0.9, 0.0, 60, sharded=True)
    *stats, state = impl.token_stats_fwd(case.logits, targets, row)
    assert stats[0][0] == -torch.inf
    assert state[0, 5] == -torch.inf
    assert state[:, :5].isfinite().all()
    state[0, 5] = 0.3
    dz = impl.token_stats_bwd(case.logits, targets, state, (ones, None, None), row)
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
            stats = token_stats(leaf, rows.to(device), backend=backend)
            (dz,) = torch.autograd.grad(getattr(stats, name).sum(), leaf)
            assert_close(f"d{name} at {p}", dz.cpu()[rows, rows], *grads, scale=grads[0].abs())
