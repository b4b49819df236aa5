"""The native backends: torch tensors in, the compiled kernels of ``csrc`` underneath.

``cpu_impl.py`` and ``cuda_impl.py`` make one :class:`NativeBackend` each, from what differs between
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from papo_kernels.checks import check_dlogits
from papo_kernels.types import (
    STATE_SIZE,
    PolicyLossParams,
    RowParams,
    TokenInputs,
    WeightingInputs,
    acc_dtype,
)

from . import extension as _native

DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_SHAPE_CODE = {"sign": 1, "tanh": 2}


class NativeBackend:
    """The four functions of the backend protocol, which ``reference.py`` documents.

    ``logits`` is ``[N, V]`` with unit column stride and any row stride; row tensors are contiguous
    ``[N]`` in the accumulation dtype (float32, or float64 for float64 logits); targets are int64.
    Arguments have been validated by ``checks.py`` and ``linear_checks.py``.

    Args:
        launch: where the extension's kernels for these logits run, as its ``Launch``; given how
            many of their columns count, 0 where rows are not summed.
        narrow: the dtypes that the gradient of float32 logits may have besides float32.
    """

    def __init__(
        self,
        launch: Callable[[ModuleType, Tensor, int], Any],
        narrow: tuple[torch.dtype, ...] = (),
    ) -> None:
        self._launch, self._narrow = launch, narrow

    def token_stats_fwd(
        self, logits: Tensor, targets: Tensor, row: RowParams, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Statistics of every row in one pass, or finished from ``state``."""
        native = _native.module()
        n = logits.shape[0]
        logp = logits.new_empty(n, dtype=acc_dtype(logits.dtype))
        entropy, unit_polarity, lse = (torch.empty_like(logp) for _ in range(3))
        new_state = logits.new_empty(n, STATE_SIZE, dtype=torch.float64)
        outputs = (logp, entropy, unit_polarity, lse, new_state)
        native.token_stats_fwd(
            _matrix(native, logits),
            targets.data_ptr(),
            _address(state),
            _row_params(native, row),
            native.TokenStatsOut(*[x.data_ptr() for x in outputs]),
            self._launch(native, logits, row.vocab_size),
        )
        return outputs

    def token_stats_bwd(
        self,
        logits: Tensor,
        targets: Tensor,
        state: Tensor,
        grads: Iterable[Tensor | None],
        row: RowParams,
        dlogits: Tensor | None = None,
    ) -> Tensor:
        """``dlogits`` (allocated where not given, may be the logits) for upstream gradients of
        logp, entropy and unit polarity; ``None`` stands for zero."""
        native = _native.module()
        if dlogits is None:
            dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        check_dlogits(logits, dlogits, self._narrow)
        # They come from autograd in whatever layout, expanded scalars included. Named until the
        # call returns: the kernels hold bare pointers.
        acc = acc_dtype(logits.dtype)
        upstream = [None if g is None else g.to(acc).contiguous() for g in grads]
        native.token_stats_bwd(
            _matrix(native, logits),
            targets.data_ptr(),
            state.data_ptr(),
            native.TokenStatsGrads(*[_address(g) for g in upstream]),
            _row_params(native, row),
            _matrix(native, dlogits),
            self._launch(native, logits, row.vocab_size),
        )
        return dlogits

    def policy_loss_fwd(
        self,
        logits: Tensor,
        targets: Tensor,
        tokens: TokenInputs,
        params: PolicyLossParams,
        weighting: WeightingInputs | None,
        row: RowParams,
        dlogits: Tensor | None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The policy loss per token and, where ``dlogits`` is given, the gradient of its sum."""
        native = _native.module()
        if dlogits is not None:
            check_dlogits(logits, dlogits, self._narrow)
        like = tokens.advantages
        outputs = [torch.empty_like(like) for _ in range(7)]
        outputs.append(torch.empty_like(like, dtype=torch.bool))
        # Named until the call returns: the kernels hold bare pointers.
        scalars = _weighting_scalars(weighting, like.dtype)
        native.policy_loss(
            _matrix(native, logits),
            native.TokenInputs(targets.data_ptr(), *[_address(x) for x in tokens], _address(state)),
            _policy_loss_params(native, params),
            _weighting(native, weighting, scalars),
            _row_params(native, row),
            native.PolicyLossOut(*[x.data_ptr() for x in outputs]),
            _no_matrix(native) if dlogits is None else _matrix(native, dlogits),
            self._launch(native, logits, row.vocab_size),
        )
        return tuple(outputs)

    def scale_(self, dlogits: Tensor, factor: Tensor) -> None:
        """``dlogits *= factor`` for a 0-dim ``factor``; nothing is touched where it is 1."""
        native = _native.module()
        factor = factor.to(acc_dtype(dlogits.dtype))
        native.scale(_matrix(native, dlogits), factor.data_ptr(), self._launch(native, dlogits, 0))


# ---- the extension's plain structs ---------------------------------------------------------------


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(native: ModuleType, tensor: Tensor) -> Any:
    rows, columns = tensor.shape
    code = DTYPE_CODE[tensor.dtype]
    return native.Matrix(tensor.data_ptr(), rows, columns, tensor.stride(0), code)


@lru_cache(maxsize=4)
def _no_matrix(native: ModuleType) -> Any:
    return native.Matrix(0, 0, 0, 0, 0)


@lru_cache(maxsize=64)
def _row_params(native: ModuleType, row: RowParams) -> Any:
    return native.RowParams(*row)


@lru_cache(maxsize=64)
def _policy_loss_params(native: ModuleType, params: PolicyLossParams) -> Any:
    return native.Objective(
        params.clip_low,
        params.clip_high,
        params.dual_clip or 0.0,
        params.kl_coef,
        params.entropy_coef,
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
