"""PAPO: a trainer for reinforcement fine-tuning that steers entropy by the polarity of tokens
(arXiv 2605.11775)."""

__version__ = "0.1.0"
