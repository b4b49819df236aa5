"""The head's matrix products: the vendor's (torch.mm, torch.addmm), exact to the dtype asked for.

Shapes: ``hidden [N, D]``, ``weight [V, D]``, a chunk's ``logits [n, V]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_TILE_BYTES = 8 * 2**20


class Projection(NamedTuple):
    """z = h W^T + b + scaling (h A^T) B^T; rows of padding are already cut from W, b and B."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, D]
    lora_b: Tensor | None  # [V, r]
    scaling: float

    @property
    def columns(self) -> int:
        return self.weight.shape[0]


@cache
def _multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device's products of `dtype` can be written, and added, in float32."""
    if device.type != "cuda":
        return False
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    out = torch.empty(16, 16, device=device)
    try:
        torch.mm(ones, ones, out_dtype=torch.float32, out=out)
        torch.addmm(out, ones, ones, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return bool((out == 32.0).all())


def _direct(a: Tensor, b: Tensor, out: Tensor, add: bool) -> bool:
    """out = a b, or out += a b, in one call where the device has it for these dtypes."""
    if not a.dtype == b.dtype == out.dtype:
        wide = a.dtype == b.dtype and out.dtype == torch.float32
        if not (wide and _multiplies_into_float32(out.device, a.dtype)):
            return False
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)
    return True


def _tiles(extent: int, other: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of `extent` such that `[tile, other]` of `dtype` fits `_TILE_BYTES`."""
    size = max(1, _TILE_BYTES // max(1, other * dtype.itemsize))
    return (slice(i, min(i + size, extent)) for i in range(0, extent, size))


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, exact to the dtype of `out`. Where the device cannot multiply
    narrower operands into it, they are widened a tile at a time along the longest extent."""
    if _direct(a, b, out, add):
        return
    wide, (m, k), n = out.dtype, a.shape, b.shape[1]
    if k >= max(m, n):
        for tile in _tiles(k, m + n, wide):
            _direct(a[:, tile].to(wide), b[tile].to(wide), out, add)
            add = True
    elif m >= n:
        b = b.to(wide)
        for tile in _tiles(m, k, wide):
            _direct(a[tile].to(wide), b, out[tile], add)
    else:
        a = a.to(wide)
        for tile in _tiles(n, k, wide):
            _direct(a, b[:, tile].to(wide), out[:, tile], add)


def write_logits(head: Projection, hidden: Tensor, logits: Tensor) -> None:
    """Write the logits of `hidden [n, D]` to `logits [n, V]`, whose dtype may be wider."""
    if head.columns == 0:
        logits.fill_(-torch.inf)  # a shard without rows: one column that is no token
        return
    weight = head.weight.t()
    if head.bias is None:
        product(hidden, weight, logits)
    elif hidden.dtype == logits.dtype:
        torch.addmm(head.bias, hidden, weight, out=logits)
    else:
        logits.copy_(head.bias)
        product(hidden, weight, logits, add=True)
    if head.lora_a is not None and head.lora_b is not None:
        low = low_rank(head, hidden, logits.dtype)
        product(low, head.lora_b.t(), logits, add=True)


def low_rank(head: Projection, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """scaling h A^T, [n, r]."""
    assert head.lora_a is not None
    low = hidden.new_empty((hidden.shape[0], head.lora_a.shape[0]), dtype=dtype)
    product(hidden, head.lora_a.t(), low)
    return low.mul_(head.scaling)
