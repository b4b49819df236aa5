"""Fused per-token log-probability, entropy, entropy polarity and policy loss for RL training.

`token_stats` and `policy_loss` take ``logits [..., V]``; `linear_token_stats` and
`linear_policy_loss` take hidden states and the head's weight, and never hold the logits whole;
`papo_kernels.head.shards` has these two for a vocabulary split across ranks. They need torch only,
choose a backend by device (`backend="reference" | "cpu" | "triton" | "cuda"`), and are ordinary
differentiable torch operations. The quantities are those of "Entropy Polarity in Reinforcement
Fine-Tuning", arXiv 2605.11775.
"""

from .api import policy_loss, token_stats
from .head.keep import KeepSet
from .linear import linear_policy_loss, linear_token_stats
from .types import LoRAHead, PolarityWeighting, PolicyLossOutput, PolicyLossParams, TokenStats

__all__ = [
    "KeepSet",
    "LoRAHead",
    "PolarityWeighting",
    "PolicyLossOutput",
    "PolicyLossParams",
    "TokenStats",
    "linear_policy_loss",
    "linear_token_stats",
    "policy_loss",
    "token_stats",
]
