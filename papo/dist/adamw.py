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

    def divisor(self, exp_avg_sq: Tensor | None, gradient: Tensor, updates: int) -> Tensor:
        """What an update with this gradient would divide its mean gradient by.

        The gradient's own square is in it, as it is in an update's: where there has never been a
        gradient, this one would else be divided by `eps`.

        Args:
            exp_avg_sq: second moments, None before the first update.
            updates: made so far.
        """
        group = self.param_groups[0]
        decay = group["betas"][1]
        square = gradient.square().mul_(1 - decay)
        if exp_avg_sq is not None:
            square.add_(exp_avg_sq, alpha=decay)
        return square.div_(1 - decay ** (updates + 1)).sqrt_().add_(group["eps"])
