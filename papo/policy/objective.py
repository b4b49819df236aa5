"""From the config's `loss` section to the kernels' surrogate (the clip, KL and entropy terms), and
the token weights of its aggregations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from papo_kernels import Objective

if TYPE_CHECKING:
    from papo.config import LossConfig


def objective_of(loss: LossConfig) -> Objective:
    """The surrogate that the config's `loss` section describes."""
    return Objective(
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip,
        kl_coef=loss.kl_coef,
        entropy_coef=loss.entropy_coef,
    )


def masked_counts(lengths: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What `mask` leaves, 0-dim each: `global_tokens` and `global_sequences`.

    Summed over the ranks, they are the arguments of these names of `sequence_token_weights`, whose
    numerator and denominator thereby share one mask.
    """
    return {
        "global_tokens": torch.where(mask, lengths, 0).sum(),
        "global_sequences": mask.sum(),
    }


def sequence_token_weights(
    lengths: Tensor,
    mask: Tensor,
    *,
    aggregation: str,
    constant_length: int | None,
    global_tokens: float,
    global_sequences: float,
) -> Tensor:
    """The weight in the loss of each token of a sequence, mask times normalizer: one per sequence.

    `token`: 1 / tokens of the global batch (DAPO). `sequence`: 1 / (sequences x this sequence's
    length) (GRPO). `constant`: 1 / (sequences x constant_length) (Dr. GRPO).

    Args:
        lengths: int or float [S], response tokens. mask: bool [S], False contributes nothing.
        global_tokens, global_sequences: `masked_counts` summed over every rank and accumulation
            step of the update.

    Returns:
        float64 [S]; all zeros (never 0/0) for a batch in which nothing is left.

    Raises:
        ValueError: an unknown aggregation, or `constant` without a positive length.
    """
    if aggregation == "token":
        tokens = torch.full_like(lengths, global_tokens, dtype=torch.float64)
    elif aggregation == "sequence":
        tokens = global_sequences * lengths.double()
    elif aggregation == "constant":
        if constant_length is None or constant_length < 1:
            raise ValueError(f"constant_length: expected a positive length, got {constant_length}")
        length = global_sequences * constant_length
        tokens = torch.full_like(lengths, length, dtype=torch.float64)
    else:
        raise ValueError(f"aggregation: expected token, sequence or constant, got {aggregation!r}")
    return torch.where(mask, 1.0 / tokens.clamp(min=1.0), 0.0)
