"""The methods: defaults that lie under what a config file says itself."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "papo": {
        "weighting": {"strength": 0.5},
        "loss": {"aggregation": "token", "clip_low": 0.2, "clip_high": 0.28},
    },
    "grpo": {
        "weighting": {"strength": 0.0},
        "loss": {"aggregation": "sequence", "clip_low": 0.2, "clip_high": 0.2},
    },
    "dapo": {
        "weighting": {"strength": 0.0},
        "loss": {"aggregation": "token", "clip_low": 0.2, "clip_high": 0.28},
        "dynamic_sampling": {"enabled": True},
        "advantage": {"overlong": "soft"},
    },
}
