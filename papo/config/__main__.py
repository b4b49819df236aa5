"""Prints docs/config.md."""

from papo.config.schema import PRESETS, TrainConfig
from papo.config.text import reference_page

print(reference_page(TrainConfig, PRESETS), end="")
