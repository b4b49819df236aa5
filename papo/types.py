"""The values that cross a stage's border. No torch here: reward workers import this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

RewardStatus = Literal["ok", "error", "timeout", "invalid"]

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Problem:
    """A prompt with its reference answer.

    Attributes:
        uid: stable across runs with the same data options, unique over training and held-out
            problems.
        messages: the chat, `{"role": ..., "content": ...}` each and whatever else the chat
            template reads, before it; the last is the user's.
        answer: the reference answer as text.
        metadata: what the verifier needs besides the answer: JSON values, and whatever else a
            Parquet column holds.
        prompt_ids: the templated prompt's token ids, generation prompt included.
    """

    uid: int
    messages: tuple[Mapping[str, Any], ...]
    answer: str
    metadata: Mapping[str, Any]
    prompt_ids: tuple[int, ...]


class KeptIds(NamedTuple):
    """What top-k and top-p left to draw each token of a completion from, as compressed rows.

    Attributes:
        counts: int64 [T] on the CPU, ids kept for each of the T sampled tokens.
        ids: int32 [sum of counts] on the CPU, token by token, the sampled id among its own.
    """

    counts: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Completion:
    """One sampled answer, token ids exactly as the sampler drew them: they are never decoded and
    encoded again.

    Attributes:
        problem: what was asked.
        response_ids: sampled ids, the end-of-sequence id included where it was sampled.
        sampler_logp: the sampler's own log-probability of each id (nats), in the distribution it
            was drawn from: at the sampling temperature, renormalised over what top-k and top-p
            kept.
        truncated: no end-of-sequence id within the token limit.
        text: the decoded response without its end-of-sequence token, and without other special
            tokens where `rollout.skip_special_tokens` says so; for verifiers and people only.
        kept: the ids that top-k and top-p kept; None where neither was on.
    """

    problem: Problem
    response_ids: tuple[int, ...]
    sampler_logp: tuple[float, ...]
    truncated: bool
    text: str
    kept: KeptIds | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Reward:
    """A verifier's verdict.

    Attributes:
        value: the reward; NaN masks the row (the verifier returned None or no finite number).
        status: `ok`; `invalid` for a masked row; `error` (the verifier raised) and `timeout` (it
            was killed) score 0.
    """

    value: float
    status: RewardStatus

    def succeeds(self, threshold: float) -> bool:
        """Whether it counts as a right answer, a sum's rounding aside; a masked one does not."""
        return self.value >= threshold - _ROUNDING
