"""The phase: is entropy too low or falling, and should the update expand it? One number in [-1, 1].

    F_k, S_k   fast and slow bias-corrected exponential averages of the global batch's mean entropy
    H*         the reference: the mean over the warm-up steps, or a number
    trend      phi = tanh(k_d (S - F) / S)
    target     phi = tanh(k_p (H* - F) / H*)
    both       phi = tanh(the sum of the two arguments)

The entropy trajectory as the phase signal is from arXiv 2605.11775; this form is papo's own choice.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from papo.config.options import PhaseConfig

FLOOR = 1e-3  # nats; entropies below it are not told apart, and nothing is divided by less
ROUNDING = 1e-6  # nats below 0 that a float32 mean of near-zero entropies may show


class PhaseController:
    """State and update of the phase. 0 during warm-up, where PAPO is exactly its baseline.

    Args:
        config: the config's `phase` section.

    Attributes:
        phase: for the next update.
    """

    def __init__(self, config: PhaseConfig) -> None:
        self._config = config
        self._steps = 0
        self._fast_sum = 0.0
        self._slow_sum = 0.0
        self._warmup_sum = 0.0
        self.phase = 0.0

    @property
    def fast(self) -> float:
        """Bias-corrected fast average in nats, NaN before the first update."""
        return self._corrected(self._fast_sum, self._config.fast_decay)

    @property
    def slow(self) -> float:
        """Bias-corrected slow average in nats, NaN before the first update."""
        return self._corrected(self._slow_sum, self._config.slow_decay)

    def _corrected(self, total: float, decay: float) -> float:
        return total / (1.0 - decay**self._steps) if self._steps else math.nan

    @property
    def reference(self) -> float:
        """H* in nats: the configured number, or the mean of the warm-up steps seen so far.

        NaN before the first of them; without a warm-up the first step's entropy serves.
        """
        if self._config.target != "warmup":
            return float(self._config.target)
        seen = min(self._steps, max(1, self._config.warmup_steps))
        return self._warmup_sum / seen if seen else math.nan

    def update(self, mean_entropy: float) -> float:
        """Take the token-mean entropy of a global batch (nats); the phase for the next update.

        Raises:
            ValueError: an entropy that is not finite or is negative; the state is unchanged.
        """
        if not math.isfinite(mean_entropy) or mean_entropy < -ROUNDING:
            raise ValueError(f"mean_entropy: expected finite nats >= 0, got {mean_entropy}")
        config = self._config
        self._steps += 1
        self._fast_sum = _decayed(self._fast_sum, config.fast_decay, mean_entropy)
        self._slow_sum = _decayed(self._slow_sum, config.slow_decay, mean_entropy)
        if self._steps <= max(1, config.warmup_steps):
            self._warmup_sum += mean_entropy
        warming_up = self._steps < config.warmup_steps
        self.phase = 0.0 if warming_up else math.tanh(self._argument())
        return self.phase

    def _argument(self) -> float:
        config = self._config
        trend = config.k_d * (self.slow - self.fast) / max(self.slow, FLOOR)
        target = config.k_p * (self.reference - self.fast) / max(self.reference, FLOOR)
        return {"trend": trend, "target": target, "both": trend + target}[config.mode]

    def metrics(self) -> dict[str, float]:
        """The averages and the reference, in nats."""
        return {
            "phase/fast": self.fast,
            "phase/slow": self.slow,
            "phase/reference": self.reference,
        }

    def state_dict(self) -> dict[str, float]:
        """Everything `load_state_dict` needs, exact in JSON."""
        return {
            "steps": self._steps,
            "fast_sum": self._fast_sum,
            "slow_sum": self._slow_sum,
            "warmup_sum": self._warmup_sum,
            "phase": self.phase,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self._steps = int(state["steps"])
        self._fast_sum = state["fast_sum"]
        self._slow_sum = state["slow_sum"]
        self._warmup_sum = state["warmup_sum"]
        self.phase = state["phase"]


def _decayed(total: float, decay: float, value: float) -> float:
    return decay * total + (1.0 - decay) * value
