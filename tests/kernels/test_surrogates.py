"""Every branch of every surrogate and estimate of KL by hand: below, at and above each bound."""

from __future__ import annotations

import math

import pytest
import torch

from papo_kernels import Objective
from tests.cases import P_A, one_token

LOGP = math.log(P_A)  # of the sampled token
INSIDE, LOW, HIGH, DUAL = range(4)
# ratio, advantage, objective, loss, dloss/dlogp, clip_side. At a bound itself a token is inside.
BRANCHES = {
    "clip": [
        (1.1, 2.0, {}, -2.2, -2.2, INSIDE),
        (1.3, 2.0, {}, -2.4, 0.0, HIGH),  # rewarded: clipped at 1.2
        (0.5, 2.0, {}, -1.0, -1.0, INSIDE),  # below, rewarded: the pessimistic branch
        (0.5, -2.0, {}, 1.6, 0.0, LOW),  # punished: clipped at 0.8
        (1.5, -2.0, {}, 3.0, 3.0, INSIDE),  # above, punished: the pessimistic branch
        (1.0, 2.0, {"clip_high": 0.0}, -2.0, -2.0, INSIDE),
        (1.0, -2.0, {"clip_low": 0.0}, 2.0, 2.0, INSIDE),
        (1.25, 1.0, {"clip_high": 0.28}, -1.25, -1.25, INSIDE),  # clip-higher
        (1.3, 1.0, {"clip_high": 0.28}, -1.28, 0.0, HIGH),
        (9.0, 1.0, {"clip_high": math.inf}, -9.0, -9.0, INSIDE),
        (0.01, -1.0, {"clip_low": 1.0}, 0.01, 0.01, INSIDE),
        (0.01, -1.0, {"clip_low": math.inf}, 0.01, 0.01, INSIDE),
        (0.85, -2.0, {"negative_clip": (0.1, 0.3)}, 1.8, 0.0, LOW),
        (0.85, 2.0, {"negative_clip": (0.1, 0.3)}, -1.7, -1.7, INSIDE),
        (5.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0, DUAL),  # 10 without
        (2.0, -2.0, {"dual_clip": 3.0}, 4.0, 4.0, INSIDE),
        (5.0, 2.0, {"dual_clip": 3.0}, -2.4, 0.0, HIGH),  # of negative advantages alone
        (5.0, -2.0, {"log_ratio_limit": math.log(2.0)}, 4.0, 0.0, INSIDE),
        (1.0, 0.0, {}, 0.0, 0.0, INSIDE),
        (5.0, 0.0, {"dual_clip": 3.0}, 0.0, 0.0, INSIDE),
    ],
    "cispo": [
        (1.1, 2.0, {}, -2.2 * LOGP, -2.2, INSIDE),
        (1.3, 2.0, {}, -2.4 * LOGP, -2.4, HIGH),  # the gradient goes on
        (0.5, 2.0, {}, -1.6 * LOGP, -1.6, LOW),
        (1.3, -2.0, {}, 2.4 * LOGP, 2.4, HIGH),
        (0.5, -2.0, {}, 1.6 * LOGP, 1.6, LOW),
        (1.0, 2.0, {"clip_low": 0.0, "clip_high": 0.0}, -2.0 * LOGP, -2.0, INSIDE),
        (1.3, -2.0, {"negative_clip": (0.1, 0.1)}, 2.2 * LOGP, 2.2, HIGH),
        (5.0, 2.0, {"clip_high": math.inf}, -10.0 * LOGP, -10.0, INSIDE),
        (5.0, -2.0, {"clip_high": 9.0, "log_ratio_limit": math.log(2.0)}, 4 * LOGP, 4.0, INSIDE),
    ],
    "sapo": [
        (1.0, 2.0, {}, -4.0, -2.0, INSIDE),
        (1.0, -2.0, {}, 4.0 / 1.05, 2.0, INSIDE),
        (1.5, 2.0, {"sapo_temperature": (2.0, 1.0)}, -2.924234, -2.359343, INSIDE),
        (1.5, -2.0, {"sapo_temperature": (2.0, 1.0)}, 4.979675, 2.820045, INSIDE),
        (0.5, 0.0, {}, 0.0, 0.0, INSIDE),
    ],
    # Of divergences: p is 0.4, p_old 0.4 / r, and the bounds are 0.2 and 0.2.
    "dppo_tv": [
        (1.25, 2.0, {}, -2.5 * LOGP, -2.5, INSIDE),  # 0.08
        (4.0, 2.0, {}, 0.0, 0.0, HIGH),  # 0.3
        (4.0, -2.0, {}, 8.0 * LOGP, 8.0, INSIDE),  # on its way back
        (4.0, -2.0, {"ratio_cap": 3.0}, 6.0 * LOGP, 6.0, INSIDE),
        (0.5, -2.0, {}, 0.0, 0.0, LOW),  # -0.4
        (0.5, 2.0, {}, -1.0 * LOGP, -1.0, INSIDE),
        (1.0, 2.0, {"clip_high": 0.0}, -2.0 * LOGP, -2.0, INSIDE),
        (1.0, -2.0, {"clip_low": 0.0}, 2.0 * LOGP, 2.0, INSIDE),
        (0.5, -2.0, {"negative_clip": (0.5, 0.5)}, 1.0 * LOGP, 1.0, INSIDE),
    ],
    "dppo_kl": [
        (1.25, 2.0, {}, -2.5 * LOGP, -2.5, INSIDE),
        (4.0, 2.0, {}, 0.0, 0.0, HIGH),  # 0.226
        (4.0, 2.0, {"clip_high": 0.23}, -8.0 * LOGP, -8.0, INSIDE),
        (4.0, -2.0, {}, 8.0 * LOGP, 8.0, INSIDE),
        (0.5, -2.0, {}, 0.0, 0.0, LOW),  # 0.335
        (0.5, -2.0, {"clip_low": 0.34}, 1.0 * LOGP, 1.0, INSIDE),
        (0.5, 2.0, {}, -1.0 * LOGP, -1.0, INSIDE),
        (1.0, 2.0, {"clip_high": 0.0}, -2.0 * LOGP, -2.0, INSIDE),
    ],
    "ce_gppo": [
        (1.1, 2.0, {}, -2.2, -2.2, INSIDE),
        (1.3, 2.0, {}, -2.4, -2.4, HIGH),
        (1.3, 2.0, {"gppo_scale": (0.5, 0.1)}, -0.24, -0.24, HIGH),
        (0.5, -2.0, {}, 1.2, 1.2, LOW),  # 0.75 * 0.8 * 2
        (0.5, 2.0, {}, -1.0, -1.0, INSIDE),
        (1.5, -2.0, {}, 3.0, 3.0, INSIDE),
        (1.0, 2.0, {"clip_high": 0.0, "gppo_scale": (0.0, 0.0)}, -2.0, -2.0, INSIDE),
        (1.0, -2.0, {"clip_low": 0.0, "gppo_scale": (0.0, 0.0)}, 2.0, 2.0, INSIDE),
    ],
}


@pytest.mark.parametrize("surrogate", BRANCHES)
def test_surrogate(surrogate, backend, device):
    for ratio, advantage, options, loss, slope, side in BRANCHES[surrogate]:
        objective = Objective(surrogate=surrogate, **options)
        out, dlogp = one_token(backend, device, ratio, advantage, objective=objective)
        where = f"{ratio=} {advantage=} {options=}"
        assert out.loss.item() == pytest.approx(loss, rel=1e-5), where
        assert dlogp == pytest.approx(slope, rel=1e-5, abs=1e-12), where
        assert out.clip_side.item() == side, where
        assert out.clipped.item() is (side != INSIDE), where
        if "log_ratio_limit" not in options:
            assert out.ratio.item() == pytest.approx(ratio, rel=1e-5)


# Estimator, x = logp - ref_logp, limit, value, slope.
ESTIMATES = [
    ("k1", 0.7, None, 0.7, 1.0),
    ("k1", -0.7, None, -0.7, 1.0),
    ("k1", -0.7, 0.5, -0.5, 0.0),
    ("k2", 0.7, None, 0.245, 0.7),
    ("k2", 3.0, 2.0, 2.0, 0.0),
    ("k3", 0.7, None, 0.196585, 0.503415),
    ("k3", -0.7, None, 0.313753, -1.013753),
    ("k3", -0.7, 0.3, 0.3, 0.0),
    ("abs", 0.7, None, 0.7, 1.0),
    ("abs", -0.7, None, 0.7, -1.0),
    ("abs", -0.7, 0.5, 0.5, 0.0),
    ("k1+", -0.7, None, -0.7, -0.7),
    ("k3+", 0.7, None, 0.196585, 0.7),
    ("k3+", -0.7, 0.3, 0.3, -0.7),  # the limit is of the value
    ("abs+", 0.7, None, 0.7, 0.7),
]


@pytest.mark.parametrize("ratio", [None, 2.0])
def test_estimates_of_kl(ratio, backend, device):
    """Alone, and times the ratio, by whose gradient the value's is added."""
    for estimator, x, limit, value, slope in ESTIMATES:
        objective = Objective(
            kl_coef=0.5, kl_estimator=estimator, kl_limit=limit, kl_ratio=ratio is not None
        )
        ref_logp = torch.tensor([LOGP - x], device=device)
        more = {"objective": objective, "ref_logp": ref_logp}
        out, dlogp = one_token(backend, device, ratio or 1.0, 0.0, **more)
        factor, added = (0.5, 0.0) if ratio is None else (0.5 * ratio, value)
        where = f"{estimator} {x=} {limit=}"
        assert out.loss.item() == pytest.approx(factor * value, rel=1e-5), where
        assert dlogp == pytest.approx(factor * (slope + added), rel=1e-5, abs=1e-6), where


@pytest.mark.parametrize("gap", [-30.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 30.0])
def test_kl_term(gap, backend, device):
    """k3 = e^gap - gap - 1 with gap = ref_logp - logp keeps its digits at both ends."""
    ref_logp = torch.tensor([math.log(P_A) + gap], device=device)
    objective = Objective(kl_coef=0.5)
    out, dlogp = one_token(backend, device, advantage=0.0, objective=objective, ref_logp=ref_logp)
    # The gap as float32 has it; its rounding, up to 6e-8, is not the kernel's doing.
    exact = ref_logp.double().item() - out.logp.double().item()
    slack = 2e-7 * abs(math.expm1(exact)) + 1e-14
    assert out.loss.item() == pytest.approx(0.5 * (math.expm1(exact) - exact), rel=1e-5, abs=slack)
    assert dlogp == pytest.approx(-0.5 * math.expm1(exact), rel=1e-5, abs=1e-7)
