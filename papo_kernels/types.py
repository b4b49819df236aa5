"""Inputs and outputs of the public functions, and the parameter tuples every backend receives."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_above, check_at_least, check_finite, check_number, check_type

IGNORE_INDEX = -100
ELSEWHERE = -1  # a sampled token that lies in another shard of the vocabulary
STATE_SIZE = 6  # float64 row_max, Z, T, Z2, T2 and target_u of a row
WEIGHT_SHAPES = ("sign", "tanh")


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits that are held, with what a model does to them before the softmax.

    A plain tensor stands for ``Logits(tensor)``.

    Args:
        values: ``[..., V]`` float16, bfloat16, float32, or float64 (reference and cpu backends).
            -inf masks a token: p = 0, gradient 0. Read without a copy where the leading dimensions
            flatten to one stride and the last has stride 1.
        softcap: u = softcap * tanh(z / softcap) / temperature; > 0, None for none.
        vocab_size: columns from there on are padding: never read, p = 0, gradient 0.
    """

    values: Tensor
    _: KW_ONLY
    softcap: float | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Compute:
    """How a call is computed. No option changes a result but by rounding.

    Args:
        backend: "reference", "cpu", "triton" or "cuda"; None: ``PAPO_BACKEND`` or else the fastest
            that serves the logits.
        chunk_bytes: the workspace of a head's logits; None: 256 MiB, or 1/32 of a GPU's memory
            where that is more.
        logits_dtype: of a head's logits; None: float32 (float64 for float64). For half-precision
            hidden states the other choice is their own dtype, which rounds every logit to 8
            (bfloat16) or 11 bits. It is faster on a CPU, where a product of half-precision numbers
            is half precision, and float32 logits take a float32 product.
        inplace: `policy_loss` overwrites the logits it is given with their gradient instead of
            allocating it. They must not be a leaf or a view, and belong to this loss alone: another
            use in a loss, or a second backward, raises. No effect under no_grad, nor under
            torch.compile, which places its buffers itself.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of its range.
    """

    backend: str | None = None
    chunk_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    inplace: bool = False

    def __post_init__(self) -> None:
        if self.backend is not None:
            check_type("backend", self.backend, str)
        if self.logits_dtype is not None:
            check_type("logits_dtype", self.logits_dtype, torch.dtype)
        check_type("inplace", self.inplace, bool)
        size = self.chunk_bytes
        if size is None:
            return
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"chunk_bytes: expected an int or None, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"chunk_bytes: expected at least 1, got {size}")


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
            logits, or in what a head makes them of.
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
        check_at_least("clip_low", self.clip_low, 0.0)
        if self.clip_low > 1.0:
            raise ValueError(f"clip_low: expected a number in [0, 1], got {self.clip_low!r}")
        if self.clip_high != math.inf:
            check_at_least("clip_high", self.clip_high, 0.0)
        if self.dual_clip is not None:
            check_above("dual_clip", self.dual_clip, 1.0)
        check_at_least("kl_coef", self.kl_coef, 0.0)
        check_finite("entropy_coef", self.entropy_coef)


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
