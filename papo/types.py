"""The values that pass from one stage to another. No torch here: reward workers import this
file."""

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
        uid: the same in all runs with the same data options, unique among training and held-out
            problems.
        messages: the chat that the template is applied to. Each message is
            `{"role": ..., "content": ...}` with whatever else the template reads; the last one is
            the user's.
        answer: the reference answer as text.
        metadata: what the verifier needs besides the answer: JSON values, and whatever else a
            Parquet column holds.
        prompt_ids: token ids of the prompt after the template, with the generation prompt.
        conversational: the row's prompt was a list of messages rather than text.
    """

    uid: int
    messages: tuple[Mapping[str, Any], ...]
    answer: str
    metadata: Mapping[str, Any]
    prompt_ids: tuple[int, ...]
    conversational: bool = False


class KeptIds(NamedTuple):
    """The ids that top-k and top-p left for each token of a completion, as compressed rows.

    Attributes:
        counts: int64 [T] on the CPU, number of ids kept for each of the T sampled tokens.
        ids: int32 [sum of counts] on the CPU, token by token; those of a token include the sampled
            one.
    """

    counts: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Completion:
    """One sampled answer. Its token ids are those that the sampler drew, never decoded text encoded
    again.

    Attributes:
        problem: what was asked.
        response_ids: sampled ids, with the end-of-sequence id if it was sampled.
        sampler_logp: the sampler's own log-probability of each id (nats), in the distribution that
            it was drawn from: at the sampling temperature, renormalized over what top-k and top-p
            kept.
        truncated: no end-of-sequence id within the token limit.
        text: the decoded response without its end-of-sequence token, and without other special
            tokens if `rollout.skip_special_tokens` is on; for verifiers and people only.
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
    """The verdict of a verifier, or of several.

    Attributes:
        value: the reward; NaN masks the row (no verifier returned a finite number).
        status: `ok`; `invalid` for a masked row; `error` (a verifier raised) and `timeout` (one was
            killed), where that verifier counts as 0.
        parts: what each verifier gave, by its name and before its weight; NaN where that is no
            finite number.
    """

    value: float
    status: RewardStatus
    parts: Mapping[str, float] = field(default_factory=dict, compare=False)

    def succeeds(self, threshold: float) -> bool:
        """Whether it counts as a right answer, give or take rounding; a masked reward does not."""
        return self.value >= threshold - _ROUNDING
