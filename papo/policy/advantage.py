"""Group-relative advantages, DAPO's soft length penalty and the token weights of the aggregations.

Pure functions of tensors: whatever spans ranks arrives as an argument. A group is a row, so no
group is ever split across a normaliser.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STD_EPS = 1e-6


class GroupAdvantages(NamedTuple):
    """`advantages` float32 [G, n], 0 where masked; `valid` bool [G, n]; `zero_spread` bool [G]."""

    advantages: Tensor
    valid: Tensor
    zero_spread: Tensor


def group_advantages(
    rewards: Tensor, *, normalize_std: bool, tolerance: float = 1e-6
) -> GroupAdvantages:
    """Advantages relative to the group: R - mean, over the group's standard deviation if asked for.

    GRPO (arXiv 2402.03300) divides, Dr.GRPO (arXiv 2503.20783) does not. The standard deviation is
    the unbiased one (n - 1) plus 1e-6.

    Args:
        rewards: float [G, n], one row a prompt. NaN masks a completion: its advantage is 0 and the
            group's statistics come from the others.
        normalize_std: divide by the standard deviation.
        tolerance: a group whose largest and smallest reward differ by at most this has zero spread
            and advantages of exactly 0. (The standard deviation of equal floats need not be 0.)
            So has a group with fewer than two valid rewards.

    Raises:
        ValueError: rewards that are not [G, n] with n >= 2, or infinite.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards: expected [G, n] with n >= 2, got {list(rewards.shape)}")
    if torch.isinf(rewards).any():
        raise ValueError("rewards: expected finite numbers or NaN, got an infinity")
    valid = ~torch.isnan(rewards)
    values = rewards.double().nan_to_num(0.0)
    count = valid.sum(1, keepdim=True)
    mean = values.sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(valid, values - mean, 0.0)
    high = torch.where(valid, values, -torch.inf).amax(1)
    low = torch.where(valid, values, torch.inf).amin(1)
    zero_spread = (count.squeeze(1) < 2) | (high - low <= tolerance)
    if normalize_std:
        variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + STD_EPS)
    advantages = torch.where(zero_spread[:, None], 0.0, centred).to(torch.float32)
    return GroupAdvantages(advantages, valid, zero_spread)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), to be added to the reward.

    0 up to `max_length - buffer` tokens, then linear down to -1 at `max_length`, -1 beyond.

    Args:
        lengths: response tokens, any shape.

    Returns:
        float32, the shape of `lengths`.

    Raises:
        ValueError: a buffer outside [1, max_length].
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer: expected 1 to {max_length} (the maximum length), got {buffer}")
    return -((lengths - (max_length - buffer)).to(torch.float32) / buffer).clamp(0.0, 1.0)


def masked_counts(lengths: Tensor, mask: Tensor) -> Tensor:
    """Tokens and sequences that `mask` leaves, float64 [2].

    Summed over the ranks they are the `global_tokens` and `global_sequences` of
    `sequence_token_weights`, whose numerator and denominator so share one mask.
    """
    return torch.stack([torch.where(mask, lengths, 0).sum(), mask.sum()]).double()


def sequence_token_weights(
    lengths: Tensor,
    mask: Tensor,
    *,
    aggregation: str,
    constant_length: int | None,
    global_tokens: float,
    global_sequences: float,
) -> Tensor:
    """The weight in the loss of each token of a sequence, mask times normaliser: one per sequence.

    `token`: 1 / tokens of the global batch (DAPO). `sequence`: 1 / (sequences x this sequence's
    length) (GRPO). `constant`: 1 / (sequences x constant_length) (Dr.GRPO).

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
