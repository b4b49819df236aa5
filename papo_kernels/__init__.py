"""Fused per-token log-probability, entropy, entropy polarity and policy loss for RL training.

There are two functions, `token_stats` and `policy_loss`. Both take logits ``[..., V]``, or
``head(hidden)``: the logits of a `Head`, which are never held whole, and whose vocabulary may be
split across ranks. They need torch only, choose a backend by device (`Compute`), and are ordinary
differentiable torch operations. `normalized_mask` and `sequence_weights` make the token weights
that a loss takes. The quantities are those of "Entropy Polarity in Reinforcement Fine-Tuning",
arXiv 2605.11775.
"""

from .aggregation import normalized_mask, sequence_weights
from .api import policy_loss, token_stats
from .head.head import Head, LazyLogits, LoRA
from .head.keep import KeepSet
from .objective import Objective, PolarityWeighting
from .types import (
    Compute,
    FullTokenStats,
    Logits,
    LogProbs,
    LogRatio,
    PolicyLossOutput,
    Sequences,
    TokenStats,
    TokenWeights,
)

__all__ = [
    "Compute",
    "FullTokenStats",
    "Head",
    "KeepSet",
    "LazyLogits",
    "LoRA",
    "LogProbs",
    "LogRatio",
    "Logits",
    "Objective",
    "PolarityWeighting",
    "PolicyLossOutput",
    "Sequences",
    "TokenStats",
    "TokenWeights",
    "normalized_mask",
    "policy_loss",
    "sequence_weights",
    "token_stats",
]
