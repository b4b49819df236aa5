"""The shapes that are measured, and how many bytes each operation must move."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """``rows`` tokens over a vocabulary of ``vocab`` logits stored as ``dtype``."""

    rows: int
    vocab: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"[{self.rows},{self.vocab}] {str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        """One pass over the logits. Statistics read them once; a loss with its gradient in place
        reads them once and writes them once; everything else is [rows] and does not count."""
        return self.rows * self.vocab * self.dtype.itemsize


# 151936: Qwen's vocabulary, a row of which (608 KB in float32) just fits a 1 MB L2 cache.
# 32000: Llama 2's. Both float32 cases exceed a 32 MB L3 cache; the others are flushed from it.
CPU_SHAPES = tuple(
    Shape(rows, vocab, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, vocab in ((64, 151936), (256, 32000))
)

GPU_MAIN = Shape(8192, 151936, torch.bfloat16)
# What gpu-check times and tunes: the main shape, Llama 3's vocabulary, few rows, many
# short ones.
GPU_TIMED = (
    GPU_MAIN,
    Shape(4096, 128256, torch.bfloat16),
    Shape(64, 151936, torch.bfloat16),
    Shape(32768, 32000, torch.bfloat16),
)
# What is compared with the peers besides: float32, few rows (131: a prime below the number of SMs),
# 2^31 logits in short rows, Gemma's vocabulary, and an odd one, whose rows mostly start off a
# 16-byte boundary.
GPU_SHAPES = (
    *GPU_TIMED,
    Shape(4096, 128256, torch.float32),
    Shape(131, 151936, torch.bfloat16),
    Shape(65600, 32000, torch.bfloat16),
    Shape(4096, 262144, torch.bfloat16),
    Shape(8192, 151937, torch.bfloat16),
)

# Where torch.compile is measured too, which takes it 10 s or so a shape.
GPU_COMPILED = (GPU_MAIN, Shape(64, 151936, torch.bfloat16))


@dataclass(frozen=True)
class LinearShape:
    """``rows`` tokens of hidden size ``hidden`` through a head of ``vocab`` rows."""

    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"[{self.rows},{self.hidden}]x[{self.vocab}] {dtype}"

    @property
    def flops(self) -> int:
        """Of one matrix product; loss and all gradients take three."""
        return 2 * self.rows * self.hidden * self.vocab


GPU_LINEAR_SHAPES = (
    LinearShape(8192, 4096, 151936, torch.bfloat16),
    LinearShape(4096, 4096, 128256, torch.bfloat16),
)
