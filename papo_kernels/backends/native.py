"""The native backends, CPU and CUDA: torch tensors in, the compiled kernels of ``csrc`` underneath.

CUDA calls run on the current stream of the logits' device, whichever device is current. They never
synchronize, allocate only what they return, and may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from papo_kernels.checks import GPU_DTYPES, HALF_DTYPES
from papo_kernels.objective import SURROGATES, Objective
from papo_kernels.types import (
    STATE_SIZE,
    RowParams,
    TokenInputs,
    WeightingInputs,
    acc_dtype,
)

from . import extension, tuning
from .extension import DTYPE_CODE
from .protocol import MOST_GPU_COLUMNS, Capabilities
from .tiles import choose_tile

_SHAPE_CODE = {"sign": 1, "tanh": 2}
_NO_MATRIX = (0, 0, 0, 0, 0)
KL_CODE = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}


class NativeBackend:
    """A `Backend` whose kernels are in the extension.

    Args:
        launch: the extension's ``Launch`` for these logits: where their kernels run. Its last
            argument is the number of columns that count, or 0 where rows are not summed.
        why_unavailable: as in `Backend`.
    """

    def __init__(
        self,
        name: str,
        capabilities: Capabilities,
        launch: Callable[[ModuleType, Tensor, int], Any],
        why_unavailable: Callable[[torch.device], str | None],
    ) -> None:
        self.name, self.capabilities = name, capabilities
        self._launch, self.why_unavailable = launch, why_unavailable

    def token_stats_fwd(
        self, logits: Tensor, targets: Tensor, row: RowParams, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        self.capabilities.check(logits)
        native = extension.module()
        n = logits.shape[0]
        logp = logits.new_empty(n, dtype=acc_dtype(logits.dtype))
        empty = torch.empty_like
        entropy, unit_polarity, lse = empty(logp), empty(logp), empty(logp)
        new_state = logits.new_empty(n, STATE_SIZE, dtype=torch.float64)
        outputs = (logp, entropy, unit_polarity, lse, new_state)
        native.token_stats_fwd(
            _matrix(logits),
            *_addresses((targets, state)),
            _row_params(native, row),
            _addresses(outputs),
            self._launch(native, logits, row.vocab_size),
        )
        return outputs

    def token_stats_bwd(
        self,
        logits: Tensor,
        targets: Tensor,
        state: Tensor,
        grads: Sequence[Tensor | None],
        row: RowParams,
        dlogits: Tensor | None = None,
    ) -> Tensor:
        if dlogits is None:
            dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        self.capabilities.check(logits, dlogits)
        native = extension.module()
        # Autograd's gradients have any layout, expanded scalars included. The name keeps them alive
        # until the call returns: the kernels hold bare pointers.
        acc = acc_dtype(logits.dtype)
        upstream = [None if g is None else g.to(acc).contiguous() for g in grads]
        native.token_stats_bwd(
            _matrix(logits),
            targets.data_ptr(),
            state.data_ptr(),
            _addresses(upstream),
            _row_params(native, row),
            _matrix(dlogits),
            self._launch(native, logits, row.vocab_size),
        )
        return dlogits

    def policy_loss_fwd(
        self,
        logits: Tensor,
        targets: Tensor,
        tokens: TokenInputs,
        objective: Objective,
        weighting: WeightingInputs | None,
        row: RowParams,
        dlogits: Tensor | None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        self.capabilities.check(logits, dlogits)
        native = extension.module()
        like = tokens.advantages
        outputs = [torch.empty_like(like) for _ in range(7)]
        outputs.append(torch.empty_like(like, dtype=torch.uint8))
        # The name keeps them alive until the call returns: the kernels hold bare pointers.
        scalars = _weighting_scalars(weighting, like.dtype)
        native.policy_loss(
            _matrix(logits),
            _addresses((targets, *tokens, state)),
            _objective(native, objective),
            _weighting(native, weighting, scalars),
            _row_params(native, row),
            _addresses(outputs),
            _NO_MATRIX if dlogits is None else _matrix(dlogits),
            self._launch(native, logits, row.vocab_size),
        )
        return tuple(outputs)

    def scale_(self, dlogits: Tensor, factor: Tensor) -> None:
        self.capabilities.check(dlogits)
        native = extension.module()
        factor = factor.to(acc_dtype(dlogits.dtype))
        native.scale(_matrix(dlogits), factor.data_ptr(), self._launch(native, dlogits, 0))


# ---- the extension's plain structs ---------------------------------------------------------------
# Those of pointers are tuples, which cost a call less than objects.


def _addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    return tuple([0 if x is None else x.data_ptr() for x in tensors])


def _matrix(tensor: Tensor) -> tuple[int, ...]:
    rows, columns = tensor.shape
    return tensor.data_ptr(), rows, columns, tensor.stride(0), DTYPE_CODE[tensor.dtype]


def _row_params(native: ModuleType, row: RowParams) -> Any:
    if row.temperatures is None:
        return _shared_row_params(native, row)
    return native.RowParams(*row[:-1], row.temperatures.data_ptr())


@lru_cache(maxsize=64)
def _shared_row_params(native: ModuleType, row: RowParams) -> Any:
    return native.RowParams(*row[:-1])


@lru_cache(maxsize=64)
def _objective(native: ModuleType, objective: Objective) -> Any:
    return native.Objective(
        SURROGATES.index(objective.surrogate),
        KL_CODE[objective.kl_value],
        objective.kl_slope_of_k2,
        objective.kl_ratio,
        objective.numbers(),
    )


def _weighting_scalars(weighting: WeightingInputs | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    if weighting is None:
        return ()
    scalars = (weighting.phase, weighting.sigma, weighting.scale)
    return tuple([s if s.dtype == dtype else s.to(dtype) for s in scalars])


def _weighting(
    native: ModuleType, weighting: WeightingInputs | None, scalars: tuple[Tensor, ...]
) -> Any:
    if weighting is None:
        return _no_weighting(native)
    return native.Weighting(
        _SHAPE_CODE[weighting.shape],
        weighting.strength,
        weighting.dead_zone,
        *[x.data_ptr() for x in scalars],
    )


@lru_cache(maxsize=4)
def _no_weighting(native: ModuleType) -> Any:
    return native.Weighting(0, 0.0, 0.0, 0, 0, 0)


# ---- CPU -----------------------------------------------------------------------------------------


def _extension_unavailable(device: torch.device) -> str | None:
    return None if extension.available() else extension.why_unavailable()


@lru_cache(maxsize=64)
def _on_threads(native: ModuleType, threads: int) -> Any:
    return native.Launch(threads=threads)


def _cpu_launch(native: ModuleType, logits: Tensor, columns: int) -> Any:
    return _on_threads(native, torch.get_num_threads())


CPU = NativeBackend("cpu", Capabilities(devices=("cpu",)), _cpu_launch, _extension_unavailable)


# ---- CUDA ----------------------------------------------------------------------------------------


def _cuda_unavailable(device: torch.device) -> str | None:
    reason = _extension_unavailable(device)
    if reason is not None:
        return reason
    if not extension.has_cuda():
        return "the extension was built without CUDA (no nvcc, or PAPO_CUDA=off)"
    if torch.version.hip is not None:
        return "it serves NVIDIA GPUs, and this torch was built for AMD"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, {device} has {major}.{minor}"
    return None


def _cuda_launch(native: ModuleType, logits: Tensor, columns: int) -> Any:
    """On the current stream of the logits' device."""
    device = logits.get_device()
    stream = torch._C._cuda_getCurrentRawStream(device)
    if columns == 0:
        return native.Launch(1, device, stream)
    choice = choose_tile(native, logits.device, logits.dtype, columns, tuning.forced())
    return native.Launch(1, device, stream, choice)


CUDA = NativeBackend(
    "cuda",
    Capabilities(("cuda",), GPU_DTYPES, HALF_DTYPES, MOST_GPU_COLUMNS),
    _cuda_launch,
    _cuda_unavailable,
)
