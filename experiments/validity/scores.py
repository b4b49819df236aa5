"""What others' scores, and polarity, predict of a batch from each token's own distribution."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from papo.policy.batch import MicroBatch
from papo_kernels import TokenStats


def token_scores(stats: TokenStats, advantages: Tensor) -> Mapping[str, Tensor]:
    """Each score of each token, float64 [N]; positive predicts growing entropy.

    PROTOCOL.md has the formulas. Ratios are 1: the policy is the one that sampled.
    """
    logp, entropy, unit = (x.double() for x in stats[:3])
    a = advantages.double()
    p = logp.exp()
    surprise = logp + entropy
    return {
        "polarity": a * unit,
        "sampled term": -a * p * surprise,
        "STEER, signed": -a * (1.0 - p) * surprise,
        "covariance": -(a - a.mean()) * (logp - logp.mean()),
        "A·L": -a * surprise,
    }


def batch_scores(stats: TokenStats, micro: MicroBatch) -> dict[str, list[float]]:
    """Sum of weight times score, over the tokens with a positive and with another advantage."""
    positive = micro.advantages > 0
    weight = micro.token_weight.double()
    return {
        name: [float((weight * score)[part].sum()) for part in (positive, ~positive)]
        for name, score in token_scores(stats, micro.advantages).items()
    }


def step_length(logits: Tensor, micro: MicroBatch) -> float:
    """Of the policy gradient by all tokens' logits, for tokens of weight 1: √(Σ A² ‖e_a − p‖²).

    Args:
        logits: float32 [N, V], divided by the temperature.
    """
    p = logits.softmax(-1)
    p[range(len(p)), micro.targets] -= 1.0
    squares = p.square().sum(-1).double()
    return float((micro.advantages.double().square() * squares).sum().sqrt())
