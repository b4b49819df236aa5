"""Fused per-token log-probability, entropy, entropy polarity and policy loss for RL training.

Two functions on ``logits [..., V]``: `token_stats` and `policy_loss`. They need torch only, choose
a backend by device (`backend="reference" | "cpu" | "triton" | "cuda"`), and are ordinary
differentiable torch operations. The quantities are those of "Entropy Polarity in Reinforcement
Fine-Tuning", arXiv 2605.11775.
"""

from .functional import policy_loss, token_stats
from .types import PolarityWeighting, PolicyLossOutput, PolicyLossParams, TokenStats

__all__ = [
    "PolarityWeighting",
    "PolicyLossOutput",
    "PolicyLossParams",
    "TokenStats",
    "policy_loss",
    "token_stats",
]
