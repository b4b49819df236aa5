"""The weights' running quantities (sigma and the pressure-conserving scale) and branch statistics.

    w_t = s (1 + lambda phi h(polarity_t / sigma))        h = sign (with a dead zone in |c|) or tanh

The loss kernel applies w in the same pass as the loss, so phi, sigma and s come from the steps
before. Pressure is sum |A|, and s conserves it:

    s = sum |A| / sum |A| (1 + lambda phi h) = P / (P + lambda phi P_h)

with P = sum |A| and P_h = sum |A| h over the global batch before. Keeping P and P_h rather than s
lets s be formed with the phase that is actually used.

The form of w, sigma and s are papo's own choice: arXiv 2605.11775 names polarity, both branches and
the phase, and its summaries leave the form open.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from papo_kernels import PolarityWeighting

if TYPE_CHECKING:
    from papo.config.options import WeightingConfig

SIGMA_FLOOR = 1e-12


class BranchSums(NamedTuple):
    """Sums over the tokens that train.

    A token's branch is the sign of its h: expanding above 0, contracting below, neither at 0 (dead
    zone, or advantage 0). Tokens whose gradient is clipped away are left out of branches and
    pressures. The last three feed the controller and include them: weights come before clipping.

    Attributes:
        tokens: all that train.
        expanding, contracting: tokens of the branch.
        pressure: sum |A| over both branches and neither.
        pressure_expanding_before, pressure_contracting_before: sum |A| of the branch.
        pressure_expanding_after, pressure_contracting_after: sum w |A| of the branch.
        square: sum of polarity squared.
        advantage: sum |A|.
        advantage_h: sum |A| h.
    """

    tokens: float
    expanding: float
    contracting: float
    pressure: float
    pressure_expanding_before: float
    pressure_contracting_before: float
    pressure_expanding_after: float
    pressure_contracting_after: float
    square: float
    advantage: float
    advantage_h: float

    @classmethod
    def size(cls) -> int:
        """Length of the vector that is summed over the ranks."""
        return len(cls._fields)

    @classmethod
    def from_tensor(cls, sums: Tensor) -> BranchSums:
        """From a vector in the order of the fields."""
        return cls(*sums.tolist())

    def metrics(self) -> dict[str, float]:
        """Shares of tokens, and pressures as parts of the unweighted pressure of all tokens.

        A branch's `after` over its `before` is the mean weight its advantages got; what the two
        branches' sums lack to 1 belongs to tokens of neither.
        """
        return {
            "polarity/expanding_share": _ratio(self.expanding, self.tokens),
            "polarity/contracting_share": _ratio(self.contracting, self.tokens),
            **{
                f"polarity/{branch}_pressure_{when}": _ratio(
                    getattr(self, f"pressure_{branch}_{when}"), self.pressure
                )
                for branch in ("expanding", "contracting")
                for when in ("before", "after")
            },
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def shape_of(
    polarity: Tensor, unit_polarity: Tensor, *, shape: str, sigma: float, dead_zone: float
) -> Tensor:
    """h(polarity / sigma): sign with a dead zone where |c| <= dead_zone, or tanh.

    The eager twin of the kernels' h, for statistics. All tensors have one shape.
    """
    if shape == "tanh":
        return torch.tanh(polarity / sigma)
    return torch.where(unit_polarity.abs() <= dead_zone, 0.0, torch.sign(polarity))


def branch_sums(
    polarity: Tensor, advantages: Tensor, weight: Tensor, live: Tensor, clipped: Tensor, h: Tensor
) -> Tensor:
    """The fields of `BranchSums` of one micro-batch, float64 on its device, to be added up.

    Args:
        polarity, advantages, weight: float [N].
        live: bool [N], tokens that train; what the others hold, NaN included, is ignored.
        clipped: bool [N], tokens whose gradient is clipped away.
        h: float [N], `shape_of`.
    """
    square = torch.where(live, polarity.double(), 0.0).square()
    advantage = torch.where(live, advantages.double(), 0.0).abs()
    h = torch.where(live, h.double(), 0.0)
    effective = live & ~clipped
    expanding, contracting = effective & (h > 0), effective & (h < 0)
    weighted = torch.where(live, weight.double(), 0.0) * advantage
    rows = (
        live.double(),
        expanding.double(),
        contracting.double(),
        advantage * effective,
        advantage * expanding,
        advantage * contracting,
        weighted * expanding,
        weighted * contracting,
        square,
        advantage,
        advantage * h,
    )
    return torch.stack([row.sum() for row in rows])


class WeightController:
    """What the kernel needs to weight the next update.

    Args:
        config: the config's `weighting` section.
    """

    def __init__(self, config: WeightingConfig) -> None:
        self._config = config
        self._steps = 0
        self._square = 0.0
        self._pressure = 0.0
        self._pressure_h = 0.0

    @property
    def sigma(self) -> float:
        """Running RMS of polarity (bias-corrected), 1 before the first update."""
        if not self._steps:
            return 1.0
        mean = self._square / (1.0 - self._config.sigma_decay**self._steps)
        return max(math.sqrt(mean), SIGMA_FLOOR)

    def scale(self, phase: float) -> float:
        """s of an update at `phase`, from the batch before; 1 before the first or if not conserved.

        Positive: |h| <= 1 and strength < 1 keep the weighted pressure above 0.
        """
        if not self._config.conserve or not self._pressure:
            return 1.0
        weighted = self._pressure + self._config.strength * phase * self._pressure_h
        return self._pressure / weighted

    def kernel_weighting(self, phase: float) -> PolarityWeighting | None:
        """Weighting for the loss kernel; None at strength 0: the baseline bit for bit."""
        config = self._config
        if config.strength == 0.0:
            return None
        return PolarityWeighting(
            strength=config.strength,
            phase=phase,
            shape=config.shape,
            sigma=self.sigma,
            scale=self.scale(phase),
            dead_zone=config.dead_zone,
        )

    def metrics(self, phase: float) -> dict[str, float]:
        """What weights an update at `phase`."""
        return {
            "weighting/lambda_phi": self._config.strength * phase,
            "weighting/sigma": self.sigma,
            "weighting/scale": self.scale(phase),
        }

    def shape_of(self, polarity: Tensor, unit_polarity: Tensor) -> Tensor:
        """h with the current sigma."""
        config = self._config
        return shape_of(
            polarity,
            unit_polarity,
            shape=config.shape,
            sigma=self.sigma,
            dead_zone=config.dead_zone,
        )

    def update(self, sums: BranchSums) -> None:
        """Take a global batch's sums. Without tokens, or with a non-finite sum, nothing changes."""
        if not sums.tokens or not all(math.isfinite(value) for value in sums):
            return
        decay = self._config.sigma_decay
        self._steps += 1
        self._square = decay * self._square + (1.0 - decay) * sums.square / sums.tokens
        self._pressure, self._pressure_h = sums.advantage, sums.advantage_h

    def state_dict(self) -> dict[str, float]:
        """Everything `load_state_dict` needs, exact in JSON."""
        return {
            "steps": self._steps,
            "square": self._square,
            "pressure": self._pressure,
            "pressure_h": self._pressure_h,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self._steps = int(state["steps"])
        self._square = state["square"]
        self._pressure = state["pressure"]
        self._pressure_h = state["pressure_h"]
