"""`python -m papo.config`: print docs/config.md."""

from papo.config import PRESETS, TrainConfig
from papo.config.page import reference_page

print(reference_page(TrainConfig, PRESETS), end="")
