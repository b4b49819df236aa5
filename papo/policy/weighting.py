"""The weights' running quantities (sigma and the pressure-conserving scale) and branch statistics.

    w_t = s (1 + lambda phi h(polarity_t / sigma))        h = sign (with a dead zone in |c|) or tanh

The loss kernel applies w in the same pass as the loss, so phi, sigma and s come from earlier steps.
Pressure is sum |A|, and s conserves it:

    s = sum |A| / sum |A| (1 + lambda phi h) = P / (P + lambda phi P_h)

Here P = sum |A| and P_h = sum |A| h are those of the last global batch. P and P_h are kept rather
than s, so that s is formed with the phase that is actually used.

The form of w, of sigma and of s is papo's own choice: arXiv 2605.11775 names polarity, both
branches and the phase, and its summaries leave the form open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from papo_kernels import PolarityWeighting
from papo_kernels.token_loss import polarity_shape, polarity_weight

if TYPE_CHECKING:
    from papo.config import WeightingConfig

SIGMA_FLOOR = 1e-12


class BranchSums(NamedTuple):
    """Sums over the tokens that train.

    A token's branch is the sign of its h: expanding above 0, contracting below, neither at 0 (dead
    zone, or advantage 0). Branches and pressures leave out the tokens whose gradient is clipped
    away. The last three sums feed the controller and include them: weights come before clipping.

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
    def of(cls, sums: Mapping[str, float]) -> BranchSums:
        """Its fields, found by name among the sums of an update."""
        return cls(*(sums[name] for name in cls._fields))

    def metrics(self) -> dict[str, float]:
        """Shares of tokens, and pressures as parts of the unweighted pressure of all tokens; NaN
        without a token, or without any pressure.

        A branch's `after` divided by its `before` is the mean weight of its advantages. Where the
        two branches' pressures do not add up to 1, the rest belongs to tokens of neither.
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
    return part / whole if whole else math.nan


def branch_sums(
    polarity: Tensor, advantages: Tensor, weight: Tensor, live: Tensor, clipped: Tensor, h: Tensor
) -> dict[str, Tensor]:
    """The fields of `BranchSums` for one micro-batch, to be added up.

    0-dim float64 on its device.

    Args:
        polarity, advantages, weight: float [N].
        live: bool [N], tokens that train; what the others hold, NaN included, is ignored.
        clipped: bool [N], tokens whose gradient is clipped away.
        h: float [N], `WeightController.shape_of`.
    """
    square = torch.where(live, polarity.double(), 0.0).square()
    advantage = torch.where(live, advantages.double(), 0.0).abs()
    h = torch.where(live, h.double(), 0.0)
    effective = live & ~clipped
    expanding, contracting = effective & (h > 0), effective & (h < 0)
    weighted = torch.where(live, weight.double(), 0.0) * advantage
    rows = {
        "tokens": live.double(),
        "expanding": expanding.double(),
        "contracting": contracting.double(),
        "pressure": advantage * effective,
        "pressure_expanding_before": advantage * expanding,
        "pressure_contracting_before": advantage * contracting,
        "pressure_expanding_after": weighted * expanding,
        "pressure_contracting_after": weighted * contracting,
        "square": square,
        "advantage": advantage,
        "advantage_h": advantage * h,
    }
    return {name: row.sum() for name, row in rows.items()}


class WeightController:
    """The running quantities that the next update is weighted with.

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
        """s of an update at `phase`, from the last batch; 1 before the first or if not conserved.

        Positive: |h| <= 1 and strength < 1 keep the weighted pressure above 0.
        """
        if not self._config.conserve or not self._pressure:
            return 1.0
        weighted = self._pressure + self._config.strength * phase * self._pressure_h
        return self._pressure / weighted

    @property
    def from_rollout(self) -> bool:
        """Whether the weights come from the old policy's polarity, once before the step's updates,
        and not from the loss kernel."""
        return self._config.source == "rollout" and self._config.strength > 0.0

    @property
    def shared(self) -> bool:
        """Whether that polarity is the one through all shared parameters."""
        return self._config.polarity == "shared" and self.from_rollout

    def kernel_weighting(self, phase: float) -> PolarityWeighting | None:
        """Weighting for the loss kernel, None where it is not to weight.

        It is not to with strength 0, where the step is the baseline's bit for bit, nor where the
        weights are `from_rollout`: the advantages hold them already.
        """
        config = self._config
        if config.strength == 0.0 or self.from_rollout:
            return None
        return PolarityWeighting(
            strength=config.strength,
            phase=phase,
            shape=config.shape,
            sigma=self.sigma,
            scale=self.scale(phase),
            dead_zone=config.dead_zone,
        )

    def rollout_weights(self, advantage: float, unit_polarity: Tensor, phase: float) -> Tensor:
        """Weights of one completion's tokens from the old policy's statistics.

        Args:
            advantage: of the completion.
            unit_polarity: float [T], of its tokens.

        Returns:
            float32 [T].
        """
        # The old policy is the sampler's: its ratio is 1 and its polarity A c.
        h = self.shape_of(advantage * unit_polarity, unit_polarity)
        weights = polarity_weight(h, self._config.strength, phase, self.scale(phase))
        return weights.to(torch.float32)

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
        return polarity_shape(polarity, unit_polarity, config.shape, self.sigma, config.dead_zone)

    def update(self, sums: BranchSums) -> None:
        """Take the sums of a global batch. Nothing changes where it had no tokens or a sum is not
        finite."""
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
