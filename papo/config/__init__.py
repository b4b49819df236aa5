"""A run's options: `load_config` reads them, `TrainConfig` holds them."""

from papo.config.schema import PRESETS, ConfigError, TrainConfig, load_config

__all__ = ["PRESETS", "ConfigError", "TrainConfig", "load_config"]
