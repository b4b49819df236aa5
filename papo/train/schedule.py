"""What a step's number alone determines: learning rate, seeds, what is due."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from papo.config import OptimConfig


def learning_rate(step: int, total: int, optim: OptimConfig) -> float:
    """Of update `step` of `total`, from 0: linear warm-up, then constant, linear or cosine to 0."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    if optim.schedule == "linear":
        return optim.lr * (1.0 - progress)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.lr


def seed_of(seed: int, *purpose: object) -> int:
    """A 63-bit seed made of the run's seed and `purpose` (stage, step, round, problem) alone."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def due(every: int, step: int) -> bool:
    """Whether something that is done every `every` steps is due after `step`; never with 0."""
    return every > 0 and step % every == 0
