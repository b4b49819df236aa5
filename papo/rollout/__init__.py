"""Sampling engines: problems in, completions out."""

from papo.rollout.hf import HFSampler, SamplingParams

__all__ = ["HFSampler", "SamplingParams"]
