"""Gradients of the head's inputs, formed slab by slab from the gradient of the logits.

Shapes: ``hidden [N, D]``, ``weight [V, D]``, a slab's ``dlogits [n, V]``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from papo_kernels.types import acc_dtype

from .plan import Needs, Selection
from .products import Projection, low_rank, product

# Of a tile of a float32 sum that is kept in two halves. On a GPU it makes an efficient product.
_CPU_TILE_BYTES, _GPU_TILE_BYTES = 8 * 2**20, 64 * 2**20


class _Sum:
    """The gradient of one parameter, summed over slabs in float32 (float64 for float64)."""

    def __init__(self, parameter: Tensor, rows: int, slabs: int, dtype: torch.dtype | None) -> None:
        # One slab: the product itself accumulates in float32 and rounds once.
        held = acc_dtype(parameter.dtype) if slabs > 1 else parameter.dtype
        self._full = torch.empty(parameter.shape, dtype=dtype or held, device=parameter.device)
        self._dtype = dtype or parameter.dtype
        self.rows = self._full[:rows]
        self._full[rows:] = 0
        self.started = False
        if slabs == 0:
            self._full.zero_()

    def add_product(self, a: Tensor, b: Tensor) -> None:
        product(a, b, self.rows, self.started)
        self.started = True

    def add_columns(self, dlogits: Tensor) -> None:
        total = dlogits.sum(dim=0, dtype=acc_dtype(dlogits.dtype))
        self.rows.copy_(self.rows + total if self.started else total)
        self.started = True

    def result(self) -> Tensor:
        return self._full.to(self._dtype)


class _SplitSum:
    """The gradient of a half-precision parameter ``[R, C]``, summed over slabs in float32.

    The sum is kept as two planes of 16 bits. The upper one is the result's own buffer, so the sum
    costs half of what a float32 buffer beside the result would.

        one float32     | s eeeeeeee mmmmmmm | mmmmmmmmmmmmmmmm |
                           upper 16 bits        lower 16 bits
                                |                    |
        between slabs    result [R, C]        lower plane [R, C]
                                |                    |
        in add_product          +----- one tile -----+     joined to float32 for a tile of rows,
                                      += a b               added to, split again
        in result()     result = the tile, rounded once to half precision

    Args:
        rows: how many receive a gradient; those after them are padding.
    """

    def __init__(self, parameter: Tensor, rows: int) -> None:
        self._full = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        self._full[rows:] = 0
        self._result = self._full[:rows]
        self._upper = self._result.view(torch.int16)
        self._lower = torch.empty_like(self._upper)
        self._started = False

    def _tiles(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Rows, their sum so far as a float32 tile (anything, before the first is added), and views
        of the lower and upper halves of its elements."""
        rows, columns = self._result.shape
        device = self._result.device
        tile_bytes = _GPU_TILE_BYTES if device.type == "cuda" else _CPU_TILE_BYTES
        size = max(1, tile_bytes // (4 * max(1, columns)))
        buffer = torch.empty(min(size, rows), columns, device=device)
        for first in range(0, rows, size):
            part = slice(first, min(first + size, rows))
            tile = buffer[: part.stop - first]
            # Little-endian, as all that torch runs on.
            lower, upper = tile.view(torch.int16).unflatten(1, (columns, 2)).unbind(2)
            if self._started:
                lower.copy_(self._lower[part])
                upper.copy_(self._upper[part])
            yield part, tile, lower, upper

    def add_product(self, a: Tensor, b: Tensor) -> None:
        for part, tile, lower, upper in self._tiles():
            product(a[part], b, tile, self._started)
            self._lower[part], self._upper[part] = lower, upper
        self._started = True

    def result(self) -> Tensor:
        for part, tile, _, _ in self._tiles():
            self._result[part] = tile
        return self._full


class Gradients:
    """Gradients of the head's inputs, formed slab by slab from the logits' gradient.

    Args:
        hidden: `[N, D]`.
        head: what the logits came from.
        full: weight, bias, lora_a and lora_b as the caller gave them, padding included.
        needs: which gradients to form; the others cost nothing.
        slabs: how many times `add` will be called.
        partial: the head is one shard of several: dhidden and the gradient of lora_a are partial
            sums and stay in float32.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Projection,
        full: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
        needs: Needs,
        slabs: int,
        partial: bool = False,
    ) -> None:
        self._head, self._needs = head, needs
        wide = acc_dtype(hidden.dtype) if partial else None
        columns = head.columns
        slabs = slabs if columns else 0
        self._dhidden = None
        if needs.hidden:
            self._dhidden = torch.zeros(
                hidden.shape, dtype=wide or hidden.dtype, device=hidden.device
            )
        weight, bias, lora_a, lora_b = full
        self._bias = None
        if needs.bias and bias is not None:
            self._bias = _Sum(bias, columns, slabs, None)
        self._sums: dict[str, _Sum | _SplitSum] = {}
        for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
            if tensor is None or not getattr(needs, name):
                continue
            replicated = name == "lora_a"
            rows, dtype = (tensor.shape[0], wide) if replicated else (columns, None)
            if slabs > 1 and dtype is None and tensor.dtype.itemsize == 2:
                self._sums[name] = _SplitSum(tensor, rows)
            else:
                self._sums[name] = _Sum(tensor, rows, slabs, dtype)

    def add(self, rows: Selection, hidden: Tensor, dlogits: Tensor, ignored: Tensor | None) -> None:
        """`hidden [n, D]` and `dlogits [n, V]` of a slab; `ignored [n]` rows have zero dlogits."""
        head, needs, sums = self._head, self._needs, self._sums
        if head.columns == 0:
            return
        low_grad = None
        if head.lora_b is not None and (needs.hidden or needs.lora_a):
            low_grad = torch.mm(dlogits, head.lora_b).mul_(head.scaling)
        if self._dhidden is not None:
            self._add_hidden(rows, dlogits, low_grad, self._dhidden)
        if ignored is not None and (needs.weight or needs.lora_a or needs.lora_b):
            # 0 * NaN: a row that does not count may hold anything.
            hidden = hidden.masked_fill(ignored[:, None], 0.0)
        if needs.weight:
            sums["weight"].add_product(dlogits.t(), hidden)
        if self._bias is not None:
            self._bias.add_columns(dlogits)
        if needs.lora_a and low_grad is not None:
            sums["lora_a"].add_product(low_grad.t(), hidden)
        if needs.lora_b:
            low = low_rank(head, hidden, acc_dtype(hidden.dtype)).to(dlogits.dtype)
            sums["lora_b"].add_product(dlogits.t(), low)

    def _add_hidden(
        self, rows: Selection, dlogits: Tensor, low_grad: Tensor | None, dhidden: Tensor
    ) -> None:
        """dlogits W + (scaling dlogits B) A into its rows, which are written once."""
        if isinstance(rows, slice):
            out = dhidden[rows]
        else:
            out = dhidden.new_empty((rows.numel(), dhidden.shape[1]))
        product(dlogits, self._head.weight, out)
        if low_grad is not None and self._head.lora_a is not None:
            product(low_grad, self._head.lora_a, out, add=True)
        if not isinstance(rows, slice):
            dhidden[rows] = out

    def results(self) -> tuple[Tensor | None, ...]:
        """dhidden and the gradients of weight, bias, lora_a, lora_b; None where not needed."""
        sums = {**self._sums, "bias": self._bias}
        formed = (sums.get(name) for name in Needs._fields[1:])
        return self._dhidden, *(None if s is None else s.result() for s in formed)
