"""Whether a call may go to its kernel directly, or has to be a torch operation.

torch's dispatcher spends more time in Python than a small kernel takes. Traced graphs, fake
tensors, subclasses and dispatch modes need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C._functorch import peek_interpreter_stack as transform
from torch.autograd import forward_ad
from torch.compiler import is_compiling

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
T = TypeVar("T")


def is_plain(tensor: Tensor) -> bool:
    """Whether nothing traces or intercepts a call on `tensor`, whose memory holds its values."""
    return (
        type(tensor) in _PLAIN_TYPES
        and not is_compiling()
        and not tensor.is_neg()
        and not dispatch_modes()
        and transform() is None
    )


def kernel_or_operation(
    tensors: Iterable[Tensor | None], kernel: Callable[..., T], operation: Callable[..., T]
) -> Callable[..., T]:
    """`kernel` where every tensor is plain, else `operation`; both take the same arguments."""
    for tensor in tensors:
        if tensor is not None and not is_plain(tensor):
            return operation
    return kernel


def refuse_forward_mode(*groups: Iterable[object]) -> None:
    """Raise where a tensor in one of the `groups`, or in a tuple in one, has a tangent, which a
    kernel would lose.

    Raises:
        NotImplementedError: forward-mode differentiation reached this call.
    """
    if forward_ad._current_level < 0:
        return
    for value in (x for group in groups for x in group):
        if isinstance(value, tuple):
            refuse_forward_mode(value)
        elif isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                "papo_kernels: forward-mode differentiation (torch.func.jvp, jacfwd, dual "
                "tensors) is not implemented; use backward() or autograd.grad()"
            )


def filled(value: float, dtype: torch.dtype, like: Tensor) -> Tensor:
    """`value` as a 0-dim tensor on the device of `like`, without a host sync. Eager calls share it,
    so it must not be written to."""
    device = like.device
    if not is_plain(like):
        # A sum, unlike full(), leaves the number a variable of a traced graph.
        return torch.zeros((), dtype=dtype, device=device) + value
    if device.type == "cpu":
        return _filled(value, dtype, device, 0)
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        # One a stream: what another stream fills may not be there yet. None in a capture: a graph
        # outlives the cache.
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        return _filled(value, dtype, device, stream)
    return torch.full((), value, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _filled(value: float, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)
