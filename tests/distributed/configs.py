"""The DeepSpeed dict of a small test run, made by the config itself."""

from __future__ import annotations

from typing import Any

from papo.config import TrainConfig
from papo.config.options import DeepSpeedConfig, ModelConfig, OptimConfig


def deepspeed_dict(stage: int, dtype: str, **offload: str) -> dict[str, Any]:
    config = TrainConfig(
        name="test",
        steps=1,
        model=ModelConfig(path="unused", dtype=dtype),
        data={"source": "reasoning_gym", "dataset": "chain_sum"},
        rollout={"prompts_per_step": 4, "completions_per_prompt": 2, "max_new_tokens": 8},
        optim=OptimConfig(lr=1e-2),
        deepspeed=DeepSpeedConfig(zero_stage=stage, **offload),
    )
    return config.deepspeed_dict(1)
