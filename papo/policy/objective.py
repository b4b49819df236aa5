"""From the config's `loss` section to the kernels' objective and the token weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from papo_kernels import Objective, sequence_weights

if TYPE_CHECKING:
    from papo.config import LossConfig

_AGGREGATIONS = {
    "token": "token-mean",
    "sequence": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}


def objective_of(loss: LossConfig) -> Objective:
    """The surrogate that the config's `loss` section describes."""
    return Objective(
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip,
        kl_coef=loss.kl_coef,
        entropy_coef=loss.entropy_coef,
    )


def token_weights(
    lengths: Tensor, loss: LossConfig, *, global_tokens: float, global_sequences: float
) -> Tensor:
    """The weight of each token of a sequence, one per sequence, by the config's aggregation.

    Args:
        lengths: ``[S]`` response tokens.
        global_tokens, global_sequences: of the update, over every rank and accumulation step.

    Returns:
        float64 ``[S]``.
    """
    return sequence_weights(
        lengths,
        _AGGREGATIONS[loss.aggregation],
        total=global_tokens if loss.aggregation == "token" else global_sequences,
        constant_length=loss.constant_length if loss.aggregation == "constant" else None,
    )
