"""What must hold whatever the logits are (section 1 to 3 of the specification)."""

from __future__ import annotations

import math
import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

from papo_kernels import Compute, Logits, Objective, PolarityWeighting, policy_loss, token_stats
from papo_kernels.objective import KL_ESTIMATORS, SURROGATES
from tests.cases import make_case, make_loss_case
from tests.oracle import check_policy_loss, check_token_stats

LONGEST = 5 if os.environ.get("TRITON_INTERPRET") == "1" else 17
# Adversarial rows: ties, huge gaps, masked tokens; and V of 1 to 17, below any vector's width.
ELEMENTS = st.one_of(
    st.floats(-8.0, 8.0, width=32),
    st.sampled_from([0.0, -0.0, 1.0, 50.0, -50.0, 1e4, -1e4, 1e-30, -120.0]),
)
ROWS = st.lists(ELEMENTS, min_size=1, max_size=LONGEST)
MASKED_ROWS = st.lists(
    st.one_of(ELEMENTS, st.just(-math.inf)), min_size=1, max_size=LONGEST
).filter(lambda row: max(row) > -math.inf)
SCALES = st.floats(0.25, 4.0)


def every_target(row, device, dtype=torch.float32):
    """Logits `[V, V]`: the row once for each of its tokens."""
    logits = torch.tensor(row, dtype=dtype, device=device).expand(len(row), -1)
    return logits, torch.arange(len(row), device=device)


@given(row=MASKED_ROWS, temperature=SCALES)
@example(row=[1e4, 0.0], temperature=1.0)
@example(row=[-math.inf] * 9 + [2.0], temperature=1.0)
def test_one_row_and_all_its_tokens(backend, device, row, temperature):
    logits, targets = every_target(row, device)
    stats = token_stats(logits, targets, temperature=temperature, compute=Compute(backend))
    p = stats.logp.double().exp()
    H, c = stats.entropy.double(), stats.unit_polarity.double()
    V = len(row)

    assert H.isfinite().all()
    assert c.isfinite().all()
    assert (stats.logp <= 1e-6).all()
    assert abs(p.sum().item() - 1.0) < 1e-5
    assert H.min() >= -1e-6
    assert H.max() <= math.log(V) + 1e-5
    assert H.max() == H.min()
    # Over the policy's own samples the entropy does not drift.
    assert abs((p * c).sum().item()) < 2e-6
    sampled_term = -p * torch.where(p > 0, stats.logp.double() + H, 0.0)
    assert (c - sampled_term).min() > -1e-6, "state_term >= 0"
    assert (c - sampled_term - (c - sampled_term)[0]).abs().max() < 2e-6, "state_term: of the row"
    assert (stats.lse + 1e-3 >= logits.amax(1) / temperature).all()


@given(row=MASKED_ROWS, temperature=SCALES)
def test_unit_polarity_is_the_directional_derivative_of_entropy(backend, device, row, temperature):
    """c = dH/du along e_a - p, with dH/du from the backward pass."""
    logits, targets = every_target(row, device)
    z = logits.clone().requires_grad_()
    stats = token_stats(z, targets, temperature=temperature, compute=Compute(backend))
    (dz,) = torch.autograd.grad(stats.entropy.sum(), z)
    p = stats.logp.double().exp()
    direction = torch.eye(len(row), device=device) - p
    sampled = p > 0  # a masked sampled token has no gradient
    derivative = (dz.double() * temperature * direction).sum(1)
    assert (derivative - stats.unit_polarity)[sampled].abs().max() < 3e-6


@given(row=ROWS)
def test_unit_polarity_by_finite_differences(backend, device, dtypes, row):
    if torch.float64 not in dtypes:
        return
    logits, targets = every_target([max(-12.0, min(z, 12.0)) for z in row], device, torch.float64)
    stats = token_stats(logits, targets, compute=Compute(backend))
    step = 1e-5 * (torch.eye(len(row)) - stats.logp.exp())
    up, down = (
        token_stats(logits + s, targets, compute=Compute(backend)).entropy for s in (step, -step)
    )
    torch.testing.assert_close((up - down) / 2e-5, stats.unit_polarity, rtol=1e-6, atol=1e-9)


@given(row=ROWS, temperature=SCALES, softcap=st.sampled_from([None, 20.0]))
def test_derivatives_by_finite_differences(backend, device, dtypes, row, temperature, softcap):
    """The three gradients one by one, each token sampled once."""
    if torch.float64 not in dtypes:
        return
    row = [max(-12.0, min(z, 12.0)) for z in row]
    logits, targets = every_target(row, device, torch.float64)

    def statistic(name, z):
        stats = token_stats(
            Logits(z, softcap=softcap), targets, temperature=temperature, compute=Compute(backend)
        )
        return getattr(stats, name)

    for name in ("logp", "entropy", "unit_polarity"):
        z = logits.clone().requires_grad_()
        (dz,) = torch.autograd.grad(statistic(name, z).sum(), z)
        for j in range(len(row)):
            step = torch.zeros(len(row), dtype=torch.float64)
            step[j] = 1e-5
            up, down = (statistic(name, logits + s) for s in (step, -step))
            torch.testing.assert_close((up - down) / 2e-5, dz[:, j], rtol=2e-6, atol=1e-8)


@pytest.mark.plumbing
@given(
    row=st.lists(st.integers(-40, 40), min_size=1, max_size=LONGEST),
    shift=st.sampled_from([-1e4, -120.0, 120.0, 1e4]),
)
def test_invariance_under_a_common_offset(backend, device, row, shift):
    """Multiples of 1/8 stay exact under the shift, so nothing may change but lse."""
    z = [x / 8.0 for x in row]
    here = token_stats(*every_target(z, device), compute=Compute(backend))
    there = token_stats(*every_target([x + shift for x in z], device), compute=Compute(backend))
    for a, b in zip(here[:3], there[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(here.lse.double() + shift, there.lse.double(), rtol=2e-7, atol=1e-6)


@pytest.mark.plumbing
@given(row=MASKED_ROWS, data=st.data())
def test_invariance_under_permutation(backend, device, row, data):
    order = data.draw(st.permutations(range(len(row))))
    index = torch.tensor(order, device=device)
    logits, targets = every_target(row, device)
    here = token_stats(logits, targets, compute=Compute(backend))
    there = token_stats(logits[:, index], targets, compute=Compute(backend))
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a[index], b, rtol=1e-6, atol=1e-6)


@pytest.mark.plumbing
@given(
    row=st.lists(st.floats(-8.0, 8.0, width=32), min_size=1, max_size=LONGEST),
    power=st.integers(-2, 3),
)
def test_temperature_divides_the_logits(backend, device, row, power):
    """By a power of two, where the division is exact: same statistics, gradient 1/temperature."""
    temperature = 2.0**power
    logits, targets = every_target(row, device)
    outcomes = []
    for z, t in ((logits, temperature), (logits / temperature, 1.0)):
        leaf = z.clone().requires_grad_()
        stats = token_stats(leaf, targets, temperature=t, compute=Compute(backend))
        (stats.logp + 0.5 * stats.entropy - 2.0 * stats.unit_polarity).sum().backward()
        outcomes.append((stats, leaf.grad * t))
    for a, b in zip(*((*stats, grad) for stats, grad in outcomes), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.plumbing
@given(row=MASKED_ROWS, upstream=st.tuples(*[st.floats(-3.0, 3.0, width=32)] * 3))
def test_gradients_of_a_row_add_up_to_zero(backend, device, row, upstream):
    """A common offset changes nothing, so the gradient is orthogonal to it; and it is finite."""
    logits, targets = every_target(row, device)
    z = logits.clone().requires_grad_()
    stats = token_stats(z, targets, compute=Compute(backend))
    terms = zip(upstream, stats[:3], strict=True)
    total = sum(g * torch.where(x.isfinite(), x, 0.0).sum() for g, x in terms)
    (dz,) = torch.autograd.grad(total, z)
    assert dz.isfinite().all()
    assert dz.sum(1).abs().max() < 1e-5
    assert dz[logits.isneginf()].eq(0).all()


@pytest.mark.plumbing
@given(
    seed=st.integers(0, 10**6),
    v=st.integers(2, 70),
    peak=st.floats(6.0, 500.0),
)
def test_reinforcing_a_peaked_argmax_contracts_entropy(backend, device, seed, v, peak):
    logits = torch.randn(4, v, generator=torch.Generator().manual_seed(seed)).to(device)
    targets = logits.argmax(1)
    # The peak holds more than half of the mass, and less than all that float32 can tell from 1.
    logits.scatter_add_(1, targets[:, None], torch.full((4, 1), min(peak, 12.0), device=device))
    stats = token_stats(logits, targets, compute=Compute(backend))
    assert (stats.logp > -0.3).all()
    assert (stats.unit_polarity < 0).all()
    logits.scatter_add_(1, targets[:, None], torch.full((4, 1), peak, device=device))
    assert (token_stats(logits, targets, compute=Compute(backend)).unit_polarity <= 0).all()


@given(v=st.integers(1, 300), value=ELEMENTS)
def test_uniform_rows(backend, device, v, value):
    logits = torch.full((2, v), value, device=device)
    stats = token_stats(logits, torch.tensor([0, v - 1], device=device), compute=Compute(backend))
    torch.testing.assert_close(stats.entropy, torch.full_like(stats.entropy, math.log(v)))
    torch.testing.assert_close(stats.logp, -stats.entropy)
    assert stats.unit_polarity.abs().max() < 5e-7 / v


@given(v=st.integers(1, 4 * LONGEST), gap=st.sampled_from([200.0, 1e3, 1e4, 6e4, math.inf]))
def test_one_hot_rows(backend, device, v, gap):
    logits = torch.full((v, v), -gap, device=device)
    logits[:, v // 2] = 0.0
    z = logits.clone().requires_grad_()
    stats = token_stats(z, torch.arange(v, device=device), compute=Compute(backend))
    assert stats.entropy.eq(0).all()
    assert stats.unit_polarity.eq(0).all()
    assert stats.logp[v // 2] == 0
    (dz,) = torch.autograd.grad((stats.entropy + stats.unit_polarity).sum(), z)
    assert dz.eq(0).all()


# ---- the weighting ------------------------------------------------------------------------------

WEIGHTINGS = st.builds(
    PolarityWeighting,
    strength=st.floats(0.0, 0.99),
    phase=st.floats(-1.0, 1.0),
    shape=st.sampled_from(["sign", "tanh"]),
    sigma=st.floats(0.01, 10.0),
    scale=st.floats(0.5, 2.0),
)


@pytest.mark.plumbing
@given(weighting=WEIGHTINGS, seed=st.integers(0, 1000))
def test_weights_are_bounded_and_follow_the_sign(backend, device, weighting, seed):
    case = make_loss_case("normal", 12, 31, device=device, seed=seed, weighting=weighting)
    out = case.policy_loss(case.logits, backend)
    used = (case.targets != -100) & (case.token_weight != 0)
    w, polarity = out.weight[used].double(), out.polarity[used]
    swing = weighting.strength * abs(weighting.phase)
    # 1 - swing is rounded in float32 as its terms are, of size 1, however small it is itself.
    rounding = 8 * 2.0**-24
    assert w.min() >= weighting.scale * (1.0 - swing - rounding)
    assert w.max() <= weighting.scale * (1.0 + swing + rounding)
    assert w.min() > 0, "both branches survive"
    tilt = (w / weighting.scale - 1.0) * weighting.phase
    assert (tilt * polarity >= -1e-6).all(), "the phase's sign favors polarity of its own sign"
    assert out.weight[~used].eq(0).all()


@pytest.mark.parametrize("shape", ["sign", "tanh"])
@pytest.mark.parametrize("off", [{"strength": 0.0, "phase": 0.8}, {"strength": 0.9, "phase": 0.0}])
def test_strength_or_phase_zero_is_the_baseline_bit_for_bit(
    shape, off, backend, device, dtypes, sizes
):
    for dtype in dtypes:
        results = []
        for weighting in (None, PolarityWeighting(shape=shape, sigma=1e-3, **off)):
            case = make_loss_case("normal", sizes(20, 3), 130, dtype=dtype, device=device)
            logits = case.logits.requires_grad_()
            out = policy_loss(
                logits,
                case.targets,
                case.advantages,
                case.token_weight,
                old_logp=case.old_logp,
                weighting=weighting,
                compute=Compute(backend),
            )
            results.append((*out, *torch.autograd.grad(out.loss, logits)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def draw_objective(data):
    """Any that papo_kernels/objective.py allows, of the level of a token."""

    def draw(*values):
        return data.draw(st.sampled_from(values))

    surrogate = data.draw(st.sampled_from(SURROGATES))
    options = {}
    if surrogate != "sapo":
        options["negative_clip"] = draw(None, (0.1, 0.3), (0.0, math.inf))
    if surrogate == "clip":
        options["dual_clip"] = draw(None, 1.01, 3.0)
    if surrogate.startswith("dppo"):
        options["ratio_cap"] = draw(None, 1.2)
    if surrogate == "sapo":
        options["sapo_temperature"] = draw((1.0, 1.05), (5.0, 0.3))
    if surrogate == "ce_gppo":
        options["gppo_scale"] = draw((0.75, 1.0), (0.0, 2.0))
    return Objective(
        clip_low=draw(0.0, 0.2, 0.03, 1.0, math.inf),
        clip_high=draw(0.0, 0.28, 0.03, math.inf),
        kl_coef=draw(0.0, 0.04, 1.0),
        entropy_coef=draw(0.0, 0.01, -0.5),
        surrogate=surrogate,
        log_ratio_limit=draw(None, 0.3),
        kl_estimator=draw(*KL_ESTIMATORS),
        kl_ratio=draw(False, True),
        kl_limit=draw(None, 0.1),
        **options,
    )


@given(
    data=st.data(),
    weighting=st.one_of(st.none(), WEIGHTINGS),
    kind=st.sampled_from(["normal", "peaked", "masked", "uniform"]),
)
def test_every_loss_option_against_one_oracle(backend, device, data, weighting, kind):
    case = make_loss_case(
        kind,
        9,
        data.draw(st.integers(2, 80)),
        device=device,
        seed=data.draw(st.integers(0, 1000)),
        **data.draw(st.sampled_from([{}, {"on_policy": True}, {"gives_log_ratio": True}])),
        own_weights=data.draw(st.booleans()),
        temperature=data.draw(st.sampled_from([1.0, 0.6, None])),
        softcap=data.draw(st.sampled_from([None, 15.0])),
        objective=draw_objective(data),
        weighting=weighting,
    )
    check_policy_loss(case, backend, factor=data.draw(st.sampled_from([1.0, -2.5])))


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 9),
    v=st.integers(1, 90),
    kind=st.sampled_from(["normal", "peaked", "masked", "negative", "one_hot"]),
    temperature=st.one_of(SCALES, st.none()),
)
def test_statistics_against_the_oracle(backend, device, seed, n, v, kind, temperature):
    case = make_case(kind, n, v, seed=seed, temperature=temperature, device=device)
    check_token_stats(case, backend, seed)
