"""`Objective`: what it accepts, what it refuses by name, and its numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from papo_kernels import Objective
from papo_kernels.objective import KL_ESTIMATORS, RATIO_LEVELS, SURROGATES

BEYOND_FLOAT32 = 1e39
# Options that are refused, and the words of the refusal.
REFUSED = [
    ({"surrogate": "ppo"}, ValueError, r"surrogate: expected one of .*, got 'ppo'"),
    ({"ratio_level": "word"}, ValueError, r"ratio_level: expected one of .*, got 'word'"),
    ({"kl_estimator": "k4"}, ValueError, r"kl_estimator: expected one of .*, got 'k4'"),
    ({"kl_estimator": "k2+"}, ValueError, r"kl_estimator: expected one of .*, got 'k2\+'"),
    ({"kl_ratio": 1}, TypeError, "kl_ratio: expected bool, got int"),
    ({"reduce": "sum"}, TypeError, "reduce: expected bool, got str"),
    ({"clip_low": -0.1}, ValueError, r"clip_low: expected a number in \[0, 1\] or inf, got -0.1"),
    ({"clip_low": 1.1}, ValueError, r"clip_low: .*got 1.1"),
    ({"clip_low": math.nan}, ValueError, "clip_low: .*got nan"),
    ({"clip_low": True}, TypeError, "clip_low: expected a number, got bool True"),
    ({"clip_high": -0.1}, ValueError, "clip_high: expected a number >= 0 or inf, got -0.1"),
    ({"clip_high": -math.inf}, ValueError, "clip_high: .*got -inf"),
    ({"clip_high": "0.2"}, TypeError, "clip_high: expected a number, got str '0.2'"),
    ({"negative_clip": 0.2}, TypeError, "negative_clip: expected a tuple of two numbers, got 0.2"),
    ({"negative_clip": (0.2,)}, TypeError, "negative_clip: expected a tuple of two numbers"),
    ({"negative_clip": (1.1, 0.2)}, ValueError, r"negative_clip\[0\]: .*got 1.1"),
    ({"negative_clip": (0.2, -0.1)}, ValueError, r"negative_clip\[1\]: .*got -0.1"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip: expected a finite number > 1, got 1.0"),
    ({"dual_clip": math.inf}, ValueError, "dual_clip: .*got inf"),
    ({"log_ratio_limit": 0.0}, ValueError, "log_ratio_limit: expected a finite number > 0"),
    ({"log_ratio_limit": BEYOND_FLOAT32}, ValueError, "log_ratio_limit: .*got 1e"),
    ({"kl_limit": 0.0}, ValueError, "kl_limit: expected a finite number > 0, got 0.0"),
    ({"kl_coef": -1.0}, ValueError, "kl_coef: expected a finite number >= 0, got -1.0"),
    ({"kl_coef": BEYOND_FLOAT32}, ValueError, "kl_coef: .*got 1e"),
    ({"entropy_coef": math.inf}, ValueError, "entropy_coef: expected a finite number"),
    ({"entropy_coef": None}, TypeError, "entropy_coef: expected a number, got NoneType None"),
    ({"sapo_temperature": (1.0, 0.0)}, ValueError, r"sapo_temperature\[1\]: .*> 0, got 0.0"),
    ({"sapo_temperature": None}, TypeError, "sapo_temperature: expected a tuple of two numbers"),
    ({"gppo_scale": (-0.1, 1.0)}, ValueError, r"gppo_scale\[0\]: .*>= 0, got -0.1"),
    # Of another surrogate.
    (
        {"surrogate": "cispo", "dual_clip": 3.0},
        ValueError,
        "dual_clip: expected None for .*'cispo'",
    ),
    ({"ratio_cap": 20.0}, ValueError, "ratio_cap: expected None for surrogate 'clip'"),
    (
        {"surrogate": "sapo", "negative_clip": (0.2, 0.2)},
        ValueError,
        "negative_clip: expected None for surrogate 'sapo'",
    ),
    ({"surrogate": "dppo_tv", "ratio_cap": 0.0}, ValueError, "ratio_cap: .*> 0, got 0.0"),
    (
        {"surrogate": "dppo_kl", "ratio_level": "sequence"},
        ValueError,
        "ratio_level: expected 'token' for surrogate 'dppo_kl'.*got 'sequence'",
    ),
    (
        {"sapo_temperature": (1.0, 2.0)},
        ValueError,
        r"sapo_temperature: expected \(1.0, 1.05\) for surrogate 'clip'",
    ),
    (
        {"surrogate": "cispo", "gppo_scale": (1.0, 1.0)},
        ValueError,
        r"gppo_scale: expected \(0.75, 1.0\) for surrogate 'cispo'",
    ),
]


@pytest.mark.parametrize(("options", "error", "words"), REFUSED)
def test_what_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        Objective(**options)


ACCEPTED = [
    {"clip_low": 0.0, "clip_high": 0.0},
    {"clip_low": 1.0},
    {"clip_low": math.inf, "clip_high": math.inf},
    {"negative_clip": (math.inf, math.inf)},
    {"clip_low": np.float32(0.2), "clip_high": np.float64(0.28), "kl_coef": np.float32(0.1)},
    {"dual_clip": np.float32(3.0), "entropy_coef": np.int64(-1)},
    {"sapo_temperature": (np.float32(1.0), 2), "surrogate": "sapo"},
    *({"ratio_level": level} for level in RATIO_LEVELS),
]


@pytest.mark.parametrize("options", ACCEPTED)
def test_what_is_accepted(options):
    """And is a number of Python's, whatever gave it."""
    objective = Objective(**options)
    assert all(isinstance(x, (int, float)) for x in objective.numbers())


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_its_numbers_make_it_again(surrogate):
    own = {
        "clip": {"dual_clip": 3.0},
        "sapo": {"sapo_temperature": (0.5, 2.0)},
        "ce_gppo": {"gppo_scale": (0.25, 0.5)},
    }
    more = {"ratio_cap": 20.0} if surrogate.startswith("dppo") else own.get(surrogate, {})
    for estimator in KL_ESTIMATORS:
        objective = Objective(
            clip_low=0.1,
            clip_high=0.3,
            negative_clip=None if surrogate == "sapo" else (0.4, 2.0),
            kl_coef=0.01,
            entropy_coef=-0.02,
            surrogate=surrogate,
            log_ratio_limit=20.0,
            kl_estimator=estimator,
            kl_ratio=True,
            kl_limit=10.0,
            **more,
        )
        names = (objective.surrogate, objective.kl_estimator, objective.kl_ratio)
        assert Objective.of_numbers(*names, objective.numbers()) == objective
        assert len(set(objective.numbers())) >= 10, "or two could be swapped"
    plain = Objective(surrogate=surrogate)
    again = Objective.of_numbers(surrogate, "k3", False, plain.numbers())
    assert again.numbers() == plain.numbers()
    assert again.dual_clip is again.kl_limit is again.log_ratio_limit is again.ratio_cap is None
