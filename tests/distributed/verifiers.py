"""A verifier whose rewards a random model earns, so that tiny runs have something to learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def even_length(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1 for a completion with an even number of characters."""
    return float(len(text) % 2 == 0)


def even_sum(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1 where the character codes have an even sum: half of a random model's completions."""
    return float(sum(map(ord, text)) % 2 == 0)
