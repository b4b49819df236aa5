"""The values that cross a stage's border. No torch here: reward workers import this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

RewardStatus = Literal["ok", "error", "timeout", "invalid"]


@dataclass(frozen=True)
class Problem:
    """A prompt with its reference answer.

    Attributes:
        uid: stable across runs with the same data options, unique over training and held-out
            problems.
        messages: the chat, `{"role": ..., "content": ...}` each, before the chat template.
        answer: the reference answer as text.
        metadata: what the verifier needs besides the answer: JSON values, and whatever else a
            Parquet column holds.
        prompt_ids: the templated prompt's token ids, generation prompt included.
    """

    uid: int
    messages: tuple[Mapping[str, str], ...]
    answer: str
    metadata: Mapping[str, Any]
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One sampled answer, token ids exactly as the sampler drew them: they are never decoded and
    encoded again.

    Attributes:
        problem: what was asked.
        response_ids: sampled ids, the end-of-sequence id included where it was sampled.
        sampler_logp: the sampler's own log-probability of each id (nats, at the sampling
            temperature).
        truncated: no end-of-sequence id within the token limit.
        text: the decoded response without its end-of-sequence token, and without other special
            tokens where `rollout.skip_special_tokens` says so; for verifiers and people only.
    """

    problem: Problem
    response_ids: tuple[int, ...]
    sampler_logp: tuple[float, ...]
    truncated: bool
    text: str


@dataclass(frozen=True)
class Reward:
    """A verifier's verdict.

    Attributes:
        value: the reward; NaN masks the row (the verifier returned None or NaN).
        status: `ok`; `invalid` for a masked row; `error` (the verifier raised) and `timeout` (it
            was killed) score 0.
    """

    value: float
    status: RewardStatus
