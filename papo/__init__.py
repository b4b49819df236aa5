"""PAPO: a trainer for reinforcement fine-tuning that steers entropy through token polarity (arXiv
2605.11775)."""

__version__ = "0.1.0"
