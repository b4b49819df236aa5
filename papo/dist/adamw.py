"""AdamW as DeepSpeed calls it, and what an update of it does to a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves weights and moments untouched where the step was found bad.

    DeepSpeed calls `step` after it has reduced the gradients: this is the last place before
    anything changes. Tensors below are float32 [n], elements of the same parameters.
    """

    blocked = False

    def step(self, closure: Any = None) -> Any:
        """One update, or none while `blocked`."""
        return None if self.blocked else super().step(closure)

    @property
    def updates(self) -> int:
        """Updates made so far (the bias correction depends on it)."""
        return max((int(s["step"]) for s in self.state.values() if "step" in s), default=0)

    def divisor(self, exp_avg_sq: Tensor, updates: int) -> Tensor:
        """What an update divides the mean gradient by.

        Args:
            updates: made so far, 1 or more.
        """
        group = self.param_groups[0]
        correction = 1 - group["betas"][1] ** updates
        return (exp_avg_sq / correction).sqrt_().add_(group["eps"])
