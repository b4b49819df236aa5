"""The phase: is entropy too low or falling, and should the update expand it? One number a step in [-1, 1].

    F_k, S_k   fast and slow bias-corrected exponential averages of the global batch's mean entropy
    H*         the target: the mean over the warm-up steps, or a number
    trend      phi = tanh(k_d (S - F) / S)
    target     phi = tanh(k_p (H* - F) / H*)
    both       phi = tanh(sum of the two arguments)

The paper (arXiv 2605.11775) names the entropy trajectory as the phase signal; this form is papo's own choice.
"""

from __future__ import annotations

import math
from typing import Any

FLOOR = 1e-3  # nats; entropies below it are not told apart, and nothing is divided by less


class PhaseController:
    """State and update of the phase. 0 during warm-up, where PAPO is exactly its baseline.

    Args:
        config: the config's `phase` section.
    """

    def __init__(self, config: Any) -> None:
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
        """H* in nats: the configured number, or the mean of the warm-up steps seen so far (NaN before the first)."""
        if self._config.target != "warmup":
            return float(self._config.target)
        seen = min(self._steps, max(1, self._config.warmup_steps))
        return self._warmup_sum / seen if seen else math.nan

    def update(self, mean_entropy: float) -> float:
        """Take the token-mean entropy of a global batch (nats) and return the phase for the next update.

        Raises:
            ValueError: an entropy that is not finite or is negative; the state is unchanged.
        """
        if not math.isfinite(mean_entropy) or mean_entropy < -1e-6:
            raise ValueError(f"mean_entropy: expected a finite number of nats >= 0, got {mean_entropy}")
        c = self._config
        self._steps += 1
        self._fast_sum = c.fast_decay * self._fast_sum + (1.0 - c.fast_decay) * mean_entropy
        self._slow_sum = c.slow_decay * self._slow_sum + (1.0 - c.slow_decay) * mean_entropy
        if self._steps <= max(1, c.warmup_steps):
            self._warmup_sum += mean_entropy
        self.phase = 0.0 if self._steps < c.warmup_steps else math.tanh(self._argument())
        return self.phase

    def _argument(self) -> float:
        c = self._config
        trend = c.k_d * (self.slow - self.fast) / max(self.slow, FLOOR)
        target = c.k_p * (self.reference - self.fast) / max(self.reference, FLOOR)
        return {"trend": trend, "target": target, "both": trend + target}[c.mode]

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
