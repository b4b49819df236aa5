"""Counts and models the CUDA kernels from their compiled machine code, without a GPU.

`python -m benchmarks.issue_model --help`. What it prints is a model's word, never a measurement.
"""
