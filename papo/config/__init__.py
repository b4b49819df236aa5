"""A run's options: `load_config` reads them, `TrainConfig` holds them, a class for each section."""

from papo.config.data import DataConfig
from papo.config.options import (
    AdvantageConfig,
    CheckpointConfig,
    DeepSpeedConfig,
    DynamicSamplingConfig,
    EvaluationConfig,
    HealthConfig,
    LossConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    PhaseConfig,
    RolloutConfig,
    WeightingConfig,
)
from papo.config.parse import ConfigError
from papo.config.presets import PRESETS
from papo.config.reward import RewardConfig
from papo.config.schema import TrainConfig, load_config

__all__ = [
    "PRESETS",
    "AdvantageConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DeepSpeedConfig",
    "DynamicSamplingConfig",
    "EvaluationConfig",
    "HealthConfig",
    "LossConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "PhaseConfig",
    "RewardConfig",
    "RolloutConfig",
    "TrainConfig",
    "WeightingConfig",
    "load_config",
]
