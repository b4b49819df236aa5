"""Fused per-token log-probability, entropy, entropy polarity and policy loss for RL training.

Two functions, `token_stats` and `policy_loss`, take logits ``[..., V]``, or the logits of hidden
states, ``Head(weight)(hidden)``, which are then never held whole, and whose vocabulary may be split
across ranks. They need torch only, choose a backend by device (`Compute`), and are ordinary
differentiable torch operations. The quantities are those of "Entropy Polarity in Reinforcement
Fine-Tuning", arXiv 2605.11775.
"""

from .api import policy_loss, token_stats
from .source import Compute, Head, KeepSet, LazyLogits, Logits, LoRA
from .types import Objective, PolarityWeighting, PolicyLossOutput, TokenStats

__all__ = [
    "Compute",
    "Head",
    "KeepSet",
    "LazyLogits",
    "LoRA",
    "Logits",
    "Objective",
    "PolarityWeighting",
    "PolicyLossOutput",
    "TokenStats",
    "policy_loss",
    "token_stats",
]
