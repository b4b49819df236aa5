"""From rewards to advantages: relative to the group, with DAPO's soft length penalty.

Pure functions: whatever spans ranks arrives as an argument. A group is a row, so no group is ever
split across a normalizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from papo.types import Completion, Reward

if TYPE_CHECKING:
    from papo.config import AdvantageConfig

STD_EPS = 1e-6


@dataclass(frozen=True)
class ScoredGroup:
    """The completions of one prompt with their rewards and advantages.

    Attributes:
        index: of the prompt among all that the step samples, over its rounds and over all ranks.
        rewards: as the verifier gave them.
        shaped: reward values after the length penalty; NaN where masked.
        advantages: 0 where masked.
        used: False for a row that trains nothing: its reward was not a number, or it was cut off
            and `advantage.overlong` is `mask`.
        zero_spread: all rewards are equal, so every advantage is 0.
    """

    index: int
    completions: tuple[Completion, ...]
    rewards: tuple[Reward, ...]
    shaped: tuple[float, ...]
    advantages: tuple[float, ...]
    used: tuple[bool, ...]
    zero_spread: bool


def score_groups(
    completions: Sequence[Completion],
    rewards: Sequence[Reward],
    indices: Sequence[int],
    advantage: AdvantageConfig,
    max_new_tokens: int,
) -> list[ScoredGroup]:
    """Rewards to advantages, group by group.

    Args:
        completions: whole groups of one size, one after the other; `rewards` are theirs.
        indices: of the groups.
        advantage: the config's `advantage` section.
    """
    if not completions:
        return []
    n = len(completions) // len(indices)
    raw = torch.tensor([r.value for r in rewards], dtype=torch.float32)
    if advantage.overlong == "soft":
        lengths = torch.tensor([len(c.response_ids) for c in completions])
        raw = raw + overlong_penalty(lengths, max_new_tokens, advantage.overlong_buffer)
    shaped = raw.view(-1, n)
    scored = group_advantages(shaped, normalize_std=advantage.normalize_std)
    groups = []
    for g, index in enumerate(indices):
        part = slice(g * n, (g + 1) * n)
        members = tuple(completions[part])
        dropped = [advantage.overlong == "mask" and c.truncated for c in members]
        groups.append(
            ScoredGroup(
                index=index,
                completions=members,
                rewards=tuple(rewards[part]),
                shaped=tuple(shaped[g].tolist()),
                advantages=tuple(scored.advantages[g].tolist()),
                used=tuple(
                    bool(v) and not d
                    for v, d in zip(scored.valid[g].tolist(), dropped, strict=True)
                ),
                zero_spread=bool(scored.zero_spread[g]),
            )
        )
    return groups


class GroupAdvantages(NamedTuple):
    """`advantages` float32 [G, n], 0 where masked; `valid` bool [G, n]; `zero_spread` bool [G]."""

    advantages: Tensor
    valid: Tensor
    zero_spread: Tensor


def group_advantages(
    rewards: Tensor, *, normalize_std: bool, tolerance: float = 1e-6
) -> GroupAdvantages:
    """Advantages relative to the group: R - mean, divided by its standard deviation if asked for.

    GRPO (arXiv 2402.03300) divides, Dr. GRPO (arXiv 2503.20783) does not. The standard deviation is
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
    centered = torch.where(valid, values - mean, 0.0)
    high = torch.where(valid, values, -torch.inf).amax(1)
    low = torch.where(valid, values, torch.inf).amin(1)
    zero_spread = (count.squeeze(1) < 2) | (high - low <= tolerance)
    if normalize_std:
        variance = centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        centered = centered / (variance.sqrt() + STD_EPS)
    advantages = torch.where(zero_spread[:, None], 0.0, centered).to(torch.float32)
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
