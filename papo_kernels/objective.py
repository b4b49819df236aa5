"""What the policy loss is: the surrogate, its KL and entropy terms, and the polarity weighting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Real
from typing import Any

from torch import Tensor

from .checks import check_above, check_at_least, check_bound, check_finite, check_number, check_type

SURROGATES = ("clip", "cispo", "sapo", "dppo_tv", "dppo_kl", "ce_gppo")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
RATIO_LEVELS = ("token", "sequence", "sequence_token")
WEIGHT_SHAPES = ("sign", "tanh")


def _plain(value: Any) -> Any:
    """A number of another library, or numbers, as Python's; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_plain(x) for x in value)
    return (
        float(value) if isinstance(value, Real) and not isinstance(value, (int, float)) else value
    )


@dataclass(frozen=True)
class Objective:
    """The surrogate and the other terms of a token's loss.

    With the ratio r, the weighted advantage A' = w A and the bounds lo = 1 - clip_low and
    hi = 1 + clip_high, a surrogate is one of

        clip      -min(r A', clip(r, lo, hi) A'); where A' < 0 at most -dual_clip A'
                  (PPO, GRPO, DAPO; dual clip: arXiv 1912.09729)
        cispo     -sg[clip(r, lo, hi)] A' logp (MiniMax-M1, arXiv 2506.13585)
        sapo      -(4 / t) sigmoid(t (r - 1)) A' with t of `sapo_temperature` (arXiv 2511.20347)
        dppo_tv   -sg[min(r, ratio_cap)] A' logp, and 0 where A' > 0 and p - p_old > clip_high, or
                  A' <= 0 and p_old - p > clip_low (arXiv 2602.04879)
        dppo_kl   the same, with the binary KL(p_old || p) in place of the difference
        ce_gppo   -r A'; where r < lo and A' < 0 -low_scale lo A' r / sg[r], and where r > hi and
                  A' > 0 -high_scale hi A' r / sg[r], with `gppo_scale` (arXiv 2509.20712)

    sg stops the gradient. At a bound itself a token counts as inside it.

    Args:
        clip_low: in [0, 1], or inf for no lower bound; of dppo, the divergence at most.
        clip_high: >= 0, inf for no upper bound.
        dual_clip: C > 1, for "clip"; None: off.
        kl_coef: coefficient of the estimate of KL(policy || reference); >= 0, needs `ref_logp`
            unless 0.
        entropy_coef: coefficient of the entropy bonus, which is subtracted from the loss.
        surrogate: one of the names above.
        negative_clip: (clip_low, clip_high) of tokens with A' <= 0; None: the same.
        ratio_level: "token"; "sequence", r is the exponential of a sequence's mean log-ratio (GSPO,
            arXiv 2507.18071); "sequence_token", its value is that and its gradient a token's own.
        log_ratio_limit: log r is clamped to its negative and it, > 0, with no gradient beyond
            (verl: 20). None: off.
        ratio_cap: of dppo, > 0; None: none (verl: 20).
        sapo_temperature: of tokens with a positive and with another advantage, > 0.
        gppo_scale: of ce_gppo, (low_scale, high_scale), >= 0.
        kl_estimator: with x = logp - ref_logp, "k1" x, "k2" x^2 / 2, "k3" exp(-x) + x - 1 or "abs"
            |x|; with a "+", that value and the gradient of k2.
        kl_ratio: the estimate is multiplied by r, through which gradient flows
            (TRL's `use_bias_correction_kl`).
        kl_limit: the estimate is clamped to its negative and it, > 0, with no gradient beyond (verl
            and OpenRLHF: 10). None: off.
        reduce: False: the loss is each token's, like `targets`, and not their sum.

    A compiled graph serves every value of the numbers; the other fields are its constants.

    Raises:
        TypeError, ValueError: an option of the wrong type, out of its range, or of another
            surrogate.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    surrogate: str = "clip"
    negative_clip: tuple[float, float] | None = None
    ratio_level: str = "token"
    log_ratio_limit: float | None = None
    ratio_cap: float | None = None
    sapo_temperature: tuple[float, float] = (1.0, 1.05)
    gppo_scale: tuple[float, float] = (0.75, 1.0)
    kl_estimator: str = "k3"
    kl_ratio: bool = False
    kl_limit: float | None = None
    reduce: bool = True

    def __post_init__(self) -> None:
        for name, values in (
            ("surrogate", SURROGATES),
            ("ratio_level", RATIO_LEVELS),
            ("kl_estimator", KL_ESTIMATORS),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {values}, got {getattr(self, name)!r}")
        for name in ("kl_ratio", "reduce"):
            check_type(name, getattr(self, name), bool)
        check_bound("clip_low", self.clip_low, 1.0)
        check_bound("clip_high", self.clip_high)
        for name in ("negative_clip", "sapo_temperature", "gppo_scale"):
            self._check_pair(name)
        for name, low in (
            ("dual_clip", 1.0),
            ("log_ratio_limit", 0.0),
            ("ratio_cap", 0.0),
            ("kl_limit", 0.0),
        ):
            if getattr(self, name) is not None:
                check_above(name, getattr(self, name), low)
        check_at_least("kl_coef", self.kl_coef, 0.0)
        check_finite("entropy_coef", self.entropy_coef)
        self._check_surrogate()
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _plain(value))

    def _check_pair(self, name: str) -> None:
        pair = getattr(self, name)
        if pair is None and name == "negative_clip":
            return
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"{name}: expected a tuple of two numbers, got {pair!r}")
        for i, value in enumerate(pair):
            if name == "negative_clip":
                check_bound(f"{name}[{i}]", value, 1.0 if i == 0 else math.inf)
            elif name == "sapo_temperature":
                check_above(f"{name}[{i}]", value, 0.0)
            else:
                check_at_least(f"{name}[{i}]", value, 0.0)

    def _check_surrogate(self) -> None:
        """Refuse options that this surrogate would ignore."""
        dppo = self.surrogate.startswith("dppo")
        if self.dual_clip is not None and self.surrogate != "clip":
            raise ValueError(f"dual_clip: expected None for surrogate {self.surrogate!r}")
        if self.ratio_cap is not None and not dppo:
            raise ValueError(f"ratio_cap: expected None for surrogate {self.surrogate!r}")
        if self.negative_clip is not None and self.surrogate == "sapo":
            raise ValueError("negative_clip: expected None for surrogate 'sapo'")
        # The defaults once more: read from their fields, they would be inputs of a traced graph.
        for name, owner, default in (
            ("sapo_temperature", "sapo", (1.0, 1.05)),
            ("gppo_scale", "ce_gppo", (0.75, 1.0)),
        ):
            given = getattr(self, name)
            if self.surrogate != owner and given != default:
                raise ValueError(
                    f"{name}: expected {default} for surrogate {self.surrogate!r}, got {given!r}"
                )
        if dppo and self.ratio_level != "token":
            raise ValueError(
                f"ratio_level: expected 'token' for surrogate {self.surrogate!r}, whose divergence "
                f"is a token's, got {self.ratio_level!r}"
            )

    @cached_property
    def _hash(self) -> int:
        # Of numbers alone, whose hash is the same in every process that unpickles it.
        return hash(self.numbers())

    def __hash__(self) -> int:  # once, not in every call
        return self._hash

    @property
    def kl_value(self) -> str:
        """`kl_estimator` without its "+"."""
        return self.kl_estimator.removesuffix("+")

    @property
    def kl_slope_of_k2(self) -> bool:
        """Whether the KL term has the gradient of k2."""
        return self.kl_estimator.endswith("+")

    def numbers(self) -> tuple[float, ...]:
        """The numbers in the order in which kernels take them; inf stands for no limit."""
        negative = self.negative_clip or (self.clip_low, self.clip_high)
        limits = (self.dual_clip, self.log_ratio_limit, self.ratio_cap, self.kl_limit)
        return (
            self.clip_low,
            self.clip_high,
            *negative,
            *(math.inf if limit is None else limit for limit in limits),
            *self.sapo_temperature,
            *self.gppo_scale,
            self.kl_coef,
            self.entropy_coef,
        )

    @classmethod
    def of_numbers(
        cls, surrogate: str, kl_estimator: str, kl_ratio: bool, numbers: Sequence[float]
    ) -> Objective:
        """The objective that gives these `numbers`."""
        low, high, *negative = numbers[:4]
        dual_clip, log_ratio_limit, ratio_cap, kl_limit = (
            None if limit == math.inf else limit for limit in numbers[4:8]
        )
        positive, other, low_scale, high_scale, kl_coef, entropy_coef = numbers[8:]
        return cls(
            low,
            high,
            dual_clip,
            kl_coef,
            entropy_coef,
            surrogate,
            None if surrogate == "sapo" else (negative[0], negative[1]),
            log_ratio_limit=log_ratio_limit,
            ratio_cap=ratio_cap,
            sapo_temperature=(positive, other),
            gppo_scale=(low_scale, high_scale),
            kl_estimator=kl_estimator,
            kl_ratio=kl_ratio,
            kl_limit=kl_limit,
        )


@dataclass(frozen=True)
class PolarityWeighting:
    """The factor on a token's advantage: w = scale (1 + strength phase h(polarity / sigma)),
    without gradient.

    Args:
        strength: in [0, 1), so that no token's weight reaches 0. 0 gives exactly `scale`.
        phase: in [-1, 1]; > 0 favors tokens that expand entropy. A float or a 0-dim tensor on the
            logits' device.
        shape: "sign", h = sign(polarity), 0 where |unit polarity| <= dead_zone; or "tanh", h =
            tanh(polarity / sigma).
        sigma: scale of the polarity for "tanh", > 0. A float or a 0-dim tensor.
        scale: a factor on every weight, > 0. A float or a 0-dim tensor.
        dead_zone: for "sign", >= 0.

    A tensor's value is not checked: reading it would synchronize the device. A compiled graph
    serves every value of the numbers; `shape` is its constant.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of its range.
    """

    strength: float
    phase: float | Tensor
    shape: str = "sign"
    sigma: float | Tensor = 1.0
    scale: float | Tensor = 1.0
    dead_zone: float = 1e-6

    def __post_init__(self) -> None:
        if not 0.0 <= check_number("strength", self.strength) < 1.0:
            raise ValueError(f"strength: expected a number in [0, 1), got {self.strength!r}")
        if self.shape not in WEIGHT_SHAPES:
            raise ValueError(f"shape: expected one of {WEIGHT_SHAPES}, got {self.shape!r}")
        for name in ("phase", "sigma", "scale"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if value.dim() != 0:
                    shape = tuple(value.shape)
                    raise ValueError(
                        f"{name}: expected a float or a 0-dim tensor, got shape {shape}"
                    )
                if not value.is_floating_point():
                    raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
            elif name == "phase":
                if not -1.0 <= check_number(name, value) <= 1.0:
                    raise ValueError(f"phase: expected a number in [-1, 1], got {value!r}")
            else:
                check_above(name, value, 0.0)
        check_at_least("dead_zone", self.dead_zone, 0.0)
