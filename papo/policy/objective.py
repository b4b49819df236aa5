"""From the config's `loss` section to the kernels' objective and the token weights."""

from __future__ import annotations

from dataclasses import fields
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
    """The objective that the config's `loss` section describes: its options have the same names."""
    names = {field.name for field in fields(Objective)} & set(type(loss).model_fields)
    return Objective(**{name: getattr(loss, name) for name in names})


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
