"""The part of a trained parameter that a rank holds: flat slices of weight, moments and gradient,
without any gather.

A slice counts the parameter's elements in C order, so that it means the same under every ZeRO stage
and on any number of ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from papo.dist import collectives

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
GRADIENT = "gradient"
COMPUTE = "compute"


class Partition(Protocol):
    """One parameter's weights, moments and gradient on this rank.

    Attributes:
        start, stop: the elements that this rank holds.
        share: those of them that this rank writes to a checkpoint; the ranks' shares cover the
            parameter once.
        compute: the weights of forward passes, flat, in the model's dtype: elements `start` to
            `stop` under ZeRO-3, else all.
        is_master: whether these are the masters; else they are the masters rounded.
    """

    start: int
    stop: int
    share: range
    compute: Tensor
    is_master: bool

    def read(self, kind: str) -> Tensor:
        """Elements `start` to `stop` of a kind, perhaps a view of them.

        Args:
            kind: MASTER or a moment, float32; COMPUTE, in the model's dtype; GRADIENT, which exists
                between the last backward pass and the step, float32, summed over the ranks and not
                clipped.
        """

    def write(self, kind: str, values: Tensor) -> None:
        """The inverse of `read` for masters and moments; compute weights follow the masters."""

    def set_compute(self, values: Tensor) -> None:
        """Set the weights of forward passes alone; a collective.

        Args:
            values: of `share`.
        """


def read_share(partition: Partition, kind: str) -> Tensor:
    """`Partition.read`, the elements of `share` alone."""
    share, start = partition.share, partition.start
    return partition.read(kind)[share.start - start : share.stop - start]


class ZeRO3Partition:
    """An equal part for every rank, the last ones padded."""

    is_master = False

    def __init__(self, parameter: Any, optimizer: Any, rank: int) -> None:
        size, numel = parameter.ds_tensor.ds_numel, parameter.ds_numel
        self.start, self.stop = (min(numel, size * r) for r in (rank, rank + 1))
        self.share = range(self.start, self.stop)
        self.compute: Tensor = parameter.ds_tensor.data[: len(self.share)]
        self._parameter, self._optimizer = parameter, optimizer

    def _padded(self, kind: str) -> Tensor:
        # DeepSpeed's public functions copy what is offloaded to the device, as if it had the room.
        zero, which = self._optimizer, (self._parameter, True)
        local: Tensor
        if kind == GRADIENT:
            local, _ = zero._get_fp32_grad_state_partition(*which)
            return local.float()
        local, _ = zero._get_fp32_opt_state_partition(*which, None if kind == MASTER else kind)
        return local.detach()

    def read(self, kind: str) -> Tensor:
        return self.compute if kind == COMPUTE else self._padded(kind)[: len(self.share)]

    def write(self, kind: str, values: Tensor) -> None:
        padded = self._padded(kind)
        padded[: len(values)].copy_(values)
        key = None if kind == MASTER else kind
        self._optimizer.set_local_hp_param(padded, self._parameter, key)
        if kind == MASTER:
            self.compute.copy_(values)

    def set_compute(self, values: Tensor) -> None:
        self.compute.copy_(values)


class FragmentPartition:
    """ZeRO-1 and 2: an interval of all parameters laid end to end, so a fragment of this one or
    nothing; the compute weights are whole on every rank."""

    is_master = False

    def __init__(self, parameter: Any, adamw: torch.optim.AdamW) -> None:
        mapping = parameter._hp_mapping  # None where the rank has nothing of the parameter
        address = None if mapping is None else mapping.lp_fragment_address
        self.start = 0 if address is None else address.start
        self.stop = 0 if address is None else address.start + address.numel
        self.share = range(self.start, self.stop)
        self.compute: Tensor = parameter.data.view(-1)
        self._parameter, self._mapping, self._adamw = parameter, mapping, adamw

    def read(self, kind: str) -> Tensor:
        if kind == COMPUTE:
            return self.compute[self.start : self.stop]
        if self._mapping is None:
            return torch.empty(0)
        if kind == MASTER:
            master: Tensor = self._mapping.hp_fragment
            return master.detach()
        if kind == GRADIENT:
            index = self._parameter._index_in_param_group
            gradient = self._mapping.get_lp_grad_fragment(index).flatten().float()
            whole = len(gradient) == len(self.compute)  # in bfloat16 under ZeRO-1
            return gradient[self.start : self.stop] if whole else gradient
        # Not from the mapping: DeepSpeed links it with the moments at the first step, and a step
        # that was blocked has made none.
        (flat,) = self._adamw.param_groups[self._mapping.param_group_index]["params"]
        address = self._mapping.hp_fragment_address
        moment: Tensor = self._adamw.state[flat][kind]
        return moment[address.start : address.start + address.numel]

    def write(self, kind: str, values: Tensor) -> None:
        self.read(kind).copy_(values)
        if kind == MASTER:
            self.compute[self.start : self.stop].copy_(values)

    def set_compute(self, values: Tensor) -> None:
        _set_whole(self.compute, self.share, values)


class ReplicatedPartition:
    """float32 without ZeRO: every rank holds everything, and the parameter is its own master."""

    is_master = True

    def __init__(self, parameter: nn.Parameter, moments: dict[str, Tensor], rank: int, world: int):
        numel = parameter.numel()
        size = -(-numel // world)
        self.start, self.stop = 0, numel
        self.share = range(min(numel, size * rank), min(numel, size * (rank + 1)))
        self.compute: Tensor = parameter.data.view(-1)
        self._parameter, self._moments = parameter, moments

    def read(self, kind: str) -> Tensor:
        if kind == GRADIENT:
            gradient = self._parameter.grad
            return torch.zeros_like(self.compute) if gradient is None else gradient.flatten()
        return self.compute if kind in (MASTER, COMPUTE) else self._moments[kind].view(-1)

    def write(self, kind: str, values: Tensor) -> None:
        self.read(kind).copy_(values)

    def set_compute(self, values: Tensor) -> None:
        _set_whole(self.compute, self.share, values)


def _set_whole(compute: Tensor, share: range, values: Tensor) -> None:
    parts = torch.zeros_like(compute)
    parts[share.start : share.stop] = values
    compute.copy_(collectives.join(parts))
