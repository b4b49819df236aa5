"""What the ranks say to each other. With engine.py and group.py, what uses torch.distributed.

Without a process group, as in tests and tools, there is one rank. With a group, every rank must
call the same functions in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from papo.errors import PapoError

T = TypeVar("T")


def rank() -> int:
    """This process's rank, 0 where no process group exists."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 where no process group exists."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _comm_device() -> torch.device:
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def sum_named(sums: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Each number summed over the ranks, with one reduction and one transfer for all of them.

    In float64, so that the result does not depend on how tokens were split.

    Args:
        sums: numbers, or 0-dim tensors of any real dtype on one device; the same names in the same
            order on every rank, and at least one.

    Returns:
        The sums by the same names, the same on every rank.
    """
    numbers = [torch.as_tensor(v, dtype=torch.float64) for v in sums.values()]
    total = torch.stack(numbers).detach().to(_comm_device())
    if world_size() > 1:
        dist.all_reduce(total)
    return dict(zip(sums, total.tolist(), strict=True))


def all_max(value: float) -> float:
    """Maximum over the ranks."""
    tensor = torch.tensor([value], dtype=torch.float64, device=_comm_device())
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


def join(parts: Tensor) -> Tensor:
    """A tensor of whose elements one rank each has the value and all others 0, bit for bit.

    Args:
        parts: the same shape and dtype on every rank; it is overwritten.
    """
    if world_size() > 1:
        # As integers: a sum of numbers would make -0 a 0.
        whole = parts.view(torch.uint8).to(_comm_device())
        dist.all_reduce(whole)
        parts.view(torch.uint8).copy_(whole)
    return parts


def gather_objects(value: T) -> list[T]:
    """`value` of every rank, in rank order, on every rank: small Python objects of our own."""
    if world_size() == 1:
        return [value]
    gathered: list[T | None] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]  # every place has been filled


def gather_lists(items: Collection[T]) -> list[T]:
    """The items of all ranks joined in rank order, on every rank."""
    return [item for part in gather_objects(list(items)) for item in part]


def exchange(parcels: Sequence[Sequence[T]]) -> list[T]:
    """What all ranks have for this one, in the order of the ranks: Python objects of our own.

    Args:
        parcels: for each rank.
    """
    if world_size() == 1:
        return list(parcels[0])
    received: list[T] = []
    for source in range(world_size()):
        mine: list[Sequence[T]] = [[]]
        sent = list(parcels) if source == rank() else None
        dist.scatter_object_list(mine, sent, src=source)
        received += mine[0]
    return received


def raise_together(failure: str | None) -> None:
    """Raise PapoError on every rank where a rank reports a failure; a collective."""
    told = next((text for text in gather_objects(failure) if text is not None), None)
    if told is not None:
        raise PapoError(told)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A PapoError of one rank's block is raised on every rank, with the same text.

    A collective at the end of the block; the block itself must hold none.
    """
    failure = None
    try:
        yield
    except PapoError as error:
        failure = str(error)
    raise_together(failure)
