"""Inputs and outputs of the public functions, and the parameter tuples every backend receives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
ELSEWHERE = -1  # a sampled token that lies in another shard of the vocabulary
STATE_SIZE = 6  # float64 row_max, Z, T, Z2, T2 and target_u of a row
HALF_DTYPES = (torch.bfloat16, torch.float16)
GPU_DTYPES = (torch.float32, *HALF_DTYPES)  # of the logits that GPU kernels take
FLOAT_DTYPES = (torch.float64, *GPU_DTYPES)
WEIGHT_SHAPES = ("sign", "tanh")


class TokenStats(NamedTuple):
    """Statistics of the sampled tokens, each shaped like `targets`; float32 (float64 for float64
    logits), in nats.

    With u = softcap(logits) / temperature and p = softmax(u):

    Attributes:
        logp: log p_a of the target a.
        entropy: H = -sum_v p_v log p_v.
        unit_polarity: c = sum_v p_v^2 (log p_v + H) - p_a (log p_a + H), the first-order change of
            H per unit of advantage and step when the target is reinforced (arXiv 2605.11775).
        lse: logsumexp(u), for diagnostics; not differentiable.
    """

    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    lse: Tensor


class PolicyLossOutput(NamedTuple):
    """What `policy_loss` returns. Everything but `loss` is detached and shaped like `targets`.

    Attributes:
        loss: scalar, sum over tokens of token_weight times the token's loss; differentiable in the
            logits.
        logp, entropy, unit_polarity: as in `TokenStats`.
        polarity: ratio * advantage * unit_polarity; positive expands entropy, negative contracts
            it.
        weight: w, the factor on the advantage.
        ratio: exp(logp - old_logp), 1 where on-policy.
        clipped: bool, whether clipping removed the token's policy gradient.
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    unit_polarity: Tensor
    polarity: Tensor
    weight: Tensor
    ratio: Tensor
    clipped: Tensor


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    return float(value)


def _check_range(name: str, value: object, low: float, *, open_low: bool = False) -> None:
    number = _number(name, value)
    above = number > low if open_low else number >= low
    # Compared, not math.isfinite: what torch.compile keeps symbolic stays so.
    if not (above and number < math.inf):
        raise ValueError(
            f"{name}: expected a finite number {'>' if open_low else '>='} {low:g}, got {value!r}"
        )


@dataclass(frozen=True)
class Objective:
    """The surrogate's options.

    Args:
        clip_low: the ratio is clipped from below at 1 - clip_low; in [0, 1].
        clip_high: the ratio is clipped from above at 1 + clip_high; >= 0, inf for no bound.
        dual_clip: C > 1: where the advantage is negative the loss is at most C |A|. None: off.
        kl_coef: coefficient of the k3 estimate of KL(policy || reference); >= 0, needs `ref_logp`
            unless 0.
        entropy_coef: coefficient of the entropy bonus (subtracted from the loss); any finite
            number.

    Raises:
        TypeError, ValueError: an option that is not a number or out of its range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        _check_range("clip_low", self.clip_low, 0.0)
        if self.clip_low > 1.0:
            raise ValueError(f"clip_low: expected a number in [0, 1], got {self.clip_low!r}")
        if self.clip_high != math.inf:
            _check_range("clip_high", self.clip_high, 0.0)
        if self.dual_clip is not None:
            _check_range("dual_clip", self.dual_clip, 1.0, open_low=True)
        _check_range("kl_coef", self.kl_coef, 0.0)
        _check_range("entropy_coef", self.entropy_coef, -math.inf, open_low=True)


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
    serves every phase, sigma and scale, float or tensor; the other fields are its constants.

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
        if not 0.0 <= _number("strength", self.strength) < 1.0:
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
                if not -1.0 <= _number(name, value) <= 1.0:
                    raise ValueError(f"phase: expected a number in [-1, 1], got {value!r}")
            else:
                _check_range(name, value, 0.0, open_low=True)
        _check_range("dead_zone", self.dead_zone, 0.0)


class RowParams(NamedTuple):
    """How logits become the distribution: u = softcap(z) / temperature over the first vocab_size
    columns.

    `softcap` 0.0 means none. Columns from vocab_size on are padding: never read, p = 0, gradient 0.
    `sharded`: the columns are a shard of the vocabulary. A target may then be ELSEWHERE, which in
    whole rows is out of range.
    """

    temperature: float
    softcap: float
    vocab_size: int
    sharded: bool = False


class TokenInputs(NamedTuple):
    """Per-token inputs of the loss, contiguous `[N]` in the accumulation dtype; None where not
    given."""

    advantages: Tensor
    token_weight: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None


class WeightingInputs(NamedTuple):
    """`PolarityWeighting` as a backend gets it: phase, sigma and scale are 0-dim on the logits'
    device."""

    strength: float
    phase: Tensor
    shape: str
    sigma: Tensor
    scale: Tensor
    dead_zone: float


class LossInputs(NamedTuple):
    """A policy loss's arguments beside the logits, as a backend takes them; `targets` is flat."""

    targets: Tensor
    tokens: TokenInputs
    objective: Objective
    weighting: WeightingInputs | None
    row: RowParams
    backend: str


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and outputs for logits of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
