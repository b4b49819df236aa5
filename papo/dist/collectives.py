"""What the ranks say to each other. With engine.py, the only file that imports torch.distributed.

Every function is the identity where no process group exists (tests, tools), and must be called by
every rank in the same order where one does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from papo.errors import PapoError


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


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, in float64 so that the result does not depend on how tokens were split.

    Args:
        values: any shape, real dtype, any device.

    Returns:
        float64 tensor on the CPU, the same on every rank.
    """
    total = values.detach().to(_comm_device(), torch.float64)
    if world_size() > 1:
        dist.all_reduce(total)
    return total.cpu()


def all_max(value: float) -> float:
    """Maximum over the ranks."""
    tensor = torch.tensor([value], dtype=torch.float64, device=_comm_device())
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank: small Python objects of our own."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_lists(items: Sequence[Any]) -> list[Any]:
    """The ranks' lists, one behind the other in rank order, on every rank."""
    return [item for part in gather_objects(list(items)) for item in part]


def raise_together(failure: str | None) -> None:
    """Raise PapoError on every rank where a rank reports a failure; a collective."""
    told = next((text for text in gather_objects(failure) if text is not None), None)
    if told is not None:
        raise PapoError(told)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """What a PapoError ends on one rank it ends on all, with the same text; a collective at the end
    of the block, which holds none itself.
    """
    failure = None
    try:
        yield
    except PapoError as error:
        failure = str(error)
    raise_together(failure)
