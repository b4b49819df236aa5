"""The part of a trained parameter that a rank holds: flat slices of weight and moments, without any
gather.

A slice counts the parameter's elements in C order, so that it means the same under every ZeRO stage
and on any number of ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Partition(Protocol):
    """One parameter's float32 master weights and moments on this rank.

    Attributes:
        start, stop: the elements that this rank holds.
        share: those of them that this rank writes to a checkpoint; the ranks' shares cover the
            parameter once.
        compute: the whole compute weights, flat, where `write` does not set them; else None.
    """

    start: int
    stop: int
    share: range
    compute: Tensor | None

    def read(self, kind: str) -> Tensor:
        """Elements `start` to `stop` of MASTER or of a moment, float32; perhaps a view of them."""

    def write(self, kind: str, values: Tensor) -> None:
        """The inverse of `read`."""


class ZeRO3Partition:
    """An equal part for every rank, the last ones padded."""

    def __init__(self, parameter: Any, optimizer: Any, rank: int) -> None:
        size, numel = parameter.ds_tensor.ds_numel, parameter.ds_numel
        self.start, self.stop = (min(numel, size * r) for r in (rank, rank + 1))
        self.share = range(self.start, self.stop)
        self.compute: Tensor | None = None
        self._parameter, self._optimizer = parameter, optimizer

    def _padded(self, kind: str) -> Tensor:
        key = None if kind == MASTER else kind
        local: Tensor = self._optimizer.get_local_fp32_param(self._parameter, key)
        return local.detach()

    def read(self, kind: str) -> Tensor:
        return self._padded(kind)[: len(self.share)]

    def write(self, kind: str, values: Tensor) -> None:
        padded = self._padded(kind)
        padded[: len(values)].copy_(values)
        # With offload it is a copy on the device.
        key = None if kind == MASTER else kind
        self._optimizer.set_local_hp_param(padded, self._parameter, key)
        if kind == MASTER:
            self._parameter.ds_tensor.data[: len(values)].copy_(values)


class FragmentPartition:
    """ZeRO-1 and 2: an interval of all parameters laid end to end, so a fragment of this one or
    nothing; the compute weights are whole on every rank."""

    def __init__(self, parameter: Any) -> None:
        mapping = parameter._hp_mapping  # None where the rank has nothing of the parameter
        address = None if mapping is None else mapping.lp_fragment_address
        self.start = 0 if address is None else address.start
        self.stop = 0 if address is None else address.start + address.numel
        self.share = range(self.start, self.stop)
        self.compute: Tensor | None = parameter.data.view(-1)
        self._mapping = mapping

    def read(self, kind: str) -> Tensor:
        if self._mapping is None:
            return torch.empty(0)
        fragment: Tensor = self._mapping.get_hp_fragment(None if kind == MASTER else kind)
        return fragment.detach()

    def write(self, kind: str, values: Tensor) -> None:
        self.read(kind).copy_(values)


class ReplicatedPartition:
    """float32 without ZeRO: every rank holds everything, and the parameter is its own master."""

    def __init__(self, parameter: nn.Parameter, moments: dict[str, Tensor], rank: int, world: int):
        numel = parameter.numel()
        size = -(-numel // world)
        self.start, self.stop = 0, numel
        self.share = range(min(numel, size * rank), min(numel, size * (rank + 1)))
        self.compute: Tensor | None = None
        self._tensors = {MASTER: parameter.data, **moments}

    def read(self, kind: str) -> Tensor:
        return self._tensors[kind].flatten()

    def write(self, kind: str, values: Tensor) -> None:
        tensor = self._tensors[kind]
        tensor.copy_(values.view(tensor.shape))
