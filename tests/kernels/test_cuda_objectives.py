"""What a row's finish holds in the CUDA kernels, on the emulated machine: every surrogate and
estimate of KL, weights and overflow, and temperatures of rows in every kernel. The reference
backend says what is right.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from papo_kernels import Objective, reference
from papo_kernels.backends.native import CUDA
from papo_kernels.objective import KL_ESTIMATORS, SURROGATES
from papo_kernels.types import RowParams, TokenInputs, WeightingInputs
from tests.kernels.cuda_emulator import DEVICES, emulated

pytestmark = pytest.mark.needs("g++")

N, V = 24, 40
ROW = RowParams(0.9, 0.0, V)
OPTIONS = {
    "clip": {"dual_clip": 1.5, "negative_clip": (0.3, 0.1)},
    "cispo": {"clip_high": 0.28},
    "sapo": {"sapo_temperature": (1.0, 2.0)},
    "dppo_tv": {"clip_low": 1e-3, "clip_high": 1e-3, "ratio_cap": 1.5},
    "dppo_kl": {"clip_low": 1e-4, "clip_high": 1e-4},
    "ce_gppo": {"gppo_scale": (0.5, 0.75)},
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_tokens(seed: int = 0) -> tuple[Tensor, Tensor, TokenInputs]:
    """Logits, targets and tokens whose ratios lie on both sides of every bound."""
    logits, targets = 3.0 * numbers(N, V, seed=seed), (torch.arange(N) * 7) % V
    logits[3, 5:20] = -torch.inf
    logp = reference.token_stats_fwd(logits, targets, ROW)[0]
    old, ref = logp + 0.5 * numbers(N, seed=seed + 1), logp + 0.5 * numbers(N, seed=seed + 2)
    weight = numbers(N, seed=seed + 3).abs() + 0.1
    return logits, targets, TokenInputs(numbers(N, seed=seed + 4), weight, old, ref)


def loss_of(backend, logits, targets, tokens, objective, weighting=None, row=ROW, state=None):
    """Outputs and the gradient."""
    dlogits = torch.empty_like(logits)
    args = (logits, targets, tokens, objective, weighting, row, dlogits, state)
    return (*backend.policy_loss_fwd(*args), dlogits)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], rtol: float = 2e-5):
    """NaN is NaN. Small numbers may be off by a part of 1e-6 of the largest."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        finite = e[e.isfinite()].abs()
        atol = 2e-6 * min(float(finite.max()) if finite.numel() else 0.0, 1.0)
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol, equal_nan=True)


def check_loss(logits, targets, tokens, objective, weighting=None) -> tuple[Tensor, ...]:
    args = (logits, targets, tokens, objective, weighting)
    actual = loss_of(CUDA, *args)
    assert_same(actual, loss_of(reference, *args))
    return actual


# ---- the terms of the loss ----------------------------------------------------------------------


def test_every_surrogate_and_every_estimate_of_kl():
    logits, targets, tokens = make_tokens()
    with emulated(**DEVICES["no_clusters"]):
        for i in range(14):
            surrogate = SURROGATES[i % 6]
            objective = Objective(
                surrogate=surrogate,
                kl_estimator=KL_ESTIMATORS[i % 7],
                kl_coef=0.1,
                kl_ratio=i % 4 < 2,
                kl_limit=(None, 0.2)[i % 3 == 0],
                log_ratio_limit=(None, 0.6)[i % 5 == 1],
                entropy_coef=0.01,
                **OPTIONS[surrogate],
            )
            *_, clip_side, _ = check_loss(logits, targets, tokens, objective)
            assert clip_side.unique().numel() == {"clip": 4, "sapo": 1}.get(surrogate, 3)


@pytest.mark.parametrize("device", ["ahead", "in_turn", "no_clusters"])
def test_log_ratio_and_weights_of_terms(device):
    """Some tokens have a weight in one term alone; those without any are not read."""
    logits, targets, tokens = make_tokens(seed=10)
    kl_weight, entropy_weight = numbers(2, N, seed=3).abs()
    tokens.token_weight[::3], kl_weight[::2], entropy_weight[::4] = 0.0, 0.0, 0.0
    none = (tokens.token_weight == 0) & (kl_weight == 0) & (entropy_weight == 0)
    assert none.any() and not none.all()
    logits[none] = torch.nan
    tokens = tokens._replace(
        old_logp=None,
        log_ratio=0.3 * numbers(N, seed=4),
        kl_weight=kl_weight,
        entropy_weight=entropy_weight,
    )
    one = [torch.tensor(x) for x in (0.5, 0.1, 1.1)]
    weighting = WeightingInputs(0.5, one[0], "tanh", one[1], one[2], 1e-6)
    with emulated(**DEVICES[device]):
        for surrogate in SURROGATES:
            objective = Objective(surrogate=surrogate, kl_coef=0.1, entropy_coef=0.01)
            outputs = check_loss(logits, targets, tokens, objective, weighting)
            assert all(x[none].eq(0).all() for x in outputs)


# ---- overflow -----------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_overflow_is_no_nan(surrogate):
    """Ratios of e^100 beside advantages of 0, masked columns, p = 0 and p = 1, with and without the
    entropy term, which brings the general form of the gradient."""
    logits, targets, tokens = make_tokens(seed=20)
    logits[:, ::3] = -torch.inf
    logits[:, 1] = -300.0
    logits[torch.arange(N), targets] = numbers(N, seed=21)
    logits[4, targets[4]] = 400.0
    logp = reference.token_stats_fwd(logits, targets, ROW)[0]
    old = torch.where(torch.arange(N) % 2 == 0, logp - 100.0, logp)
    tokens = tokens._replace(old_logp=old, ref_logp=logp + 0.25)
    tokens.advantages[::4] = 0.0
    tokens.ref_logp[1] += 100.0
    one = torch.tensor(1.0)
    weighting = WeightingInputs(0.5, one, "tanh", one, one, 1e-6)
    with emulated(**DEVICES["no_clusters"]):
        for entropy_coef in (0.0, 0.01):
            options = {"dual_clip": 3.0} if surrogate == "clip" else {}
            objective = Objective(
                surrogate=surrogate, kl_coef=0.1, entropy_coef=entropy_coef, **options
            )
            outputs = loss_of(CUDA, logits, targets, tokens, objective, weighting)
            expected = loss_of(reference, logits, targets, tokens, objective, weighting)
            for actual, right in zip(outputs, expected, strict=True):
                assert not right.isnan().any()
                assert actual[right == 0].eq(0).all()
                assert not actual.isnan().any()
            calm = torch.arange(N) % 4 == 0  # advantage 0
            assert_same([x[calm] for x in outputs], [x[calm] for x in expected])


def test_what_only_a_small_weight_brings_back_is_finite():
    """Of the ratio in row 0 and of k3 in row 1."""
    logits, targets = torch.zeros(2, 8), torch.tensor([0, 1])
    logp = reference.token_stats_fwd(logits, targets, RowParams(1.0, 0.0, 8))[0]
    small, row = torch.full((2,), 1e-6), RowParams(1.0, 0.0, 8)
    tokens = TokenInputs(torch.tensor([-1.0, 0.0]), small, logp - 92.9, logp)
    tokens.ref_logp[1] += 92.9
    with emulated(**DEVICES["no_clusters"]):
        args = (logits, targets, tokens, Objective(kl_coef=1.0), None, row)
        actual, expected = loss_of(CUDA, *args), loss_of(reference, *args)
        assert expected[0].isfinite().all() and expected[0].ge(2e34).all()
        assert_same((actual[0], actual[-1]), (expected[0], expected[-1]))


def test_scale_by_0_writes_zeros():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((3, 1001), torch.inf).to(dtype)
        with emulated():
            for y in (x, x[:, 3:]):
                CUDA.scale_(y, torch.tensor(0.0))
                assert y.eq(0).all()


# ---- the statistics' gradient -------------------------------------------------------------------


def test_gradient_of_every_statistic():
    """Each alone, where the others are not given, and all together; saturated where infinite."""
    logits, targets, _ = make_tokens(seed=30)
    logits[7, targets[7]] = 400.0
    state = reference.token_stats_fwd(logits, targets, ROW)[-1]
    upstream = tuple(numbers(4, N, seed=31))
    alone = [[g if i == k else None for i, g in enumerate(upstream)] for k in range(4)]
    with emulated():
        for grads in ([*upstream], *alone):
            args = (logits, targets, state, grads, ROW)
            assert_same((CUDA.token_stats_bwd(*args),), (reference.token_stats_bwd(*args),))
        for k in range(4):
            grads = [torch.full((N,), torch.inf) if i == k else None for i in range(4)]
            actual = CUDA.token_stats_bwd(logits, targets, state, grads, ROW)
            assert not actual.isnan().any()
            assert actual[3, 5:20].eq(0).all()


# ---- temperatures of rows -----------------------------------------------------------------------

TEMPERATURES = (0.7, 2.5, 1e-6, 1e6)


@pytest.mark.parametrize(
    "dtype, softcap",
    [(torch.bfloat16, 0.0), (torch.float16, 0.0), (torch.float32, 0.0), (torch.float32, 5.0)],
)
@pytest.mark.parametrize("device", ["ahead", "in_turn", "no_clusters"])
def test_temperatures_of_rows(device, dtype, softcap):
    """A row's bits are those of a call with its temperature for all rows: statistics by both
    kernels, the loss from logits and from a state, and both gradients."""
    n, v = 16, 601
    logits = (3.0 * numbers(n, v)).to(dtype)
    logits[::4, ::3] = -torch.inf
    targets = (torch.arange(n) * 89) % v
    targets[5] = -100
    temperatures = torch.tensor(TEMPERATURES).repeat(n)[:n].contiguous()
    own = RowParams(1.0, softcap, v, False, temperatures)
    weight = torch.full((n,), 0.5)
    tokens = TokenInputs(numbers(n, seed=1), weight, None, None)
    grads, objective = tuple(numbers(4, n, seed=2)), Objective(entropy_coef=0.1)

    def results(row: RowParams) -> tuple[Tensor, ...]:
        *stats, state = CUDA.token_stats_fwd(logits, targets, row)
        again = CUDA.token_stats_fwd(logits[:3], targets[:3], few(row))
        args = (logits, targets, tokens, objective, None, row)
        return (
            *stats,
            state,
            *(torch.cat([x, y[3:]]) for x, y in zip(again, (*stats, state), strict=True)),
            *loss_of(CUDA, *args),
            *loss_of(CUDA, *args, state),
            CUDA.token_stats_bwd(logits, targets, state, grads, row),
        )

    with emulated(**DEVICES[device]):
        found = results(own)
        for t in TEMPERATURES:
            here = temperatures == torch.tensor(t)
            shared = results(RowParams(float(torch.tensor(t)), softcap, v))
            for a, e in zip(found, shared, strict=True):
                assert torch.equal(a[here], e[here])


def few(row: RowParams) -> RowParams:
    """Of the first three rows."""
    given = row.temperatures
    return row._replace(temperatures=None if given is None else given[:3].contiguous())


@pytest.mark.parametrize("device", ["ahead", "in_turn", "no_clusters"])
def test_a_row_without_a_temperature_is_nan(device):
    logits, targets, tokens = make_tokens(seed=40)
    temperatures = numbers(N, seed=41).abs() + 0.3
    bad = torch.tensor([1, 4, 7, 9])
    temperatures[bad] = torch.tensor([0.0, -1.0, torch.nan, torch.inf])
    row, good = ROW._replace(temperatures=temperatures), torch.ones(N, dtype=torch.bool)
    good[bad] = False
    objective = Objective(kl_coef=0.1, entropy_coef=0.01)
    with emulated(**DEVICES[device]):
        args = (logits, targets, tokens, objective, None, row)
        actual, expected = loss_of(CUDA, *args), loss_of(reference, *args)
        assert_same(actual, expected)
        *stats, state = CUDA.token_stats_fwd(logits, targets, row)
        assert_same(stats, reference.token_stats_fwd(logits, targets, row)[:4])
        grads = tuple(numbers(4, N, seed=42))
        gradient = CUDA.token_stats_bwd(logits, targets, state, grads, row)
    for x in (*actual[:-2], actual[-1], *stats, gradient):
        assert x[bad].isnan().all() and x[good].isfinite().all()
