"""What every backend offers: four functions over rows of logits, and what it can serve.

`papo_kernels.reference` defines the results. The callers have validated all arguments: `logits` is
``[N, V]`` with unit column stride and any row stride, `targets` is ``[N]`` int64, row tensors are
``[N]`` in the accumulation dtype, float32 or for float64 logits float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from papo_kernels.checks import FLOAT_DTYPES
from papo_kernels.objective import Objective
from papo_kernels.types import RowParams, TokenInputs, WeightingInputs

MOST_GPU_COLUMNS = 2**30  # the GPU kernels count columns in 32 bits


def dtype_names(dtypes: Sequence[torch.dtype]) -> tuple[str, ...]:
    """The dtypes' names without ``torch.``"""
    return tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)


@dataclass(frozen=True)
class Capabilities:
    """What a backend can serve, on whatever machine.

    Attributes:
        devices: the types of the devices whose tensors it takes; None: any.
        logits_dtypes: the dtypes of logits that it takes.
        half_gradients: the half-precision dtypes in which it can write the gradient of float32
            logits. Otherwise a gradient has the dtype of its logits.
        most_columns: V at most; None: no limit.
    """

    devices: tuple[str, ...] | None = None
    logits_dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    half_gradients: tuple[torch.dtype, ...] = ()
    most_columns: int | None = None

    def why_refused(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why logits of `dtype` on `device` are not served; None if they are."""
        if self.devices is not None and device.type not in self.devices:
            served = " and ".join(name.upper() for name in self.devices)
            return f"it serves {served} tensors, not {device.type}"
        if dtype not in self.logits_dtypes:
            *names, refused = dtype_names((*self.logits_dtypes, dtype))
            return f"it serves {', '.join(names)} logits, not {refused}"
        return None

    def check(self, logits: Tensor, dlogits: Tensor | None = None) -> None:
        """Refuse a matrix of logits, or a matrix for their gradient, that a call cannot take.

        Raises:
            ValueError: too many columns.
            TypeError: the gradient's dtype.
        """
        if self.most_columns is not None and logits.shape[1] > self.most_columns:
            most = f"2^{self.most_columns.bit_length() - 1}"
            raise ValueError(f"logits: expected at most {most} columns, got {logits.shape[1]}")
        if dlogits is None or dlogits.dtype is logits.dtype:
            return
        if logits.dtype is not torch.float32 or dlogits.dtype not in self.half_gradients:
            halves = " or ".join(dtype_names(self.half_gradients))
            besides = f", or {halves} where those are float32" if halves else ""
            raise TypeError(
                f"dlogits: expected {logits.dtype} like logits{besides}, got {dlogits.dtype}"
            )


class Backend(Protocol):
    """One implementation of the kernels.

    Attributes:
        name: what `backend=` and ``PAPO_BACKEND`` call it.
    """

    name: str
    capabilities: Capabilities

    def why_unavailable(self, device: torch.device) -> str | None:
        """Why this installation or machine cannot run it on `device`; None if it can."""

    def token_stats_fwd(
        self, logits: Tensor, targets: Tensor, row: RowParams, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Statistics of every row.

        Args:
            logits: ``[N, V]``, whole rows or a shard of their columns.
            targets: ``[N]``. -100: the row is not read and its outputs are 0. -1, where
                ``row.sharded``: the sampled token lies in another shard. Any other value out of
                range makes the row NaN, except on the cpu backend, whose callers check.
            row: how logits become the distribution.
            state: the state of the whole rows (`reference.merge_states`): the logits are then not
                read.

        Returns:
            logp, entropy, unit_polarity, lse, each ``[N]`` in the accumulation dtype, and the state
            ``[N, 6]`` float64: row_max, the sums Z, T, Z2, T2 about it, and the scaled logit of the
            sampled token, which is -inf where the token is masked or elsewhere. A shard without a
            finite logit has the state (-inf, 0, 0, 0, 0, .), the identity of the merge. NaN and
            +inf make the state NaN.
        """

    def token_stats_bwd(
        self,
        logits: Tensor,
        targets: Tensor,
        state: Tensor,
        grads: Sequence[Tensor | None],
        row: RowParams,
        dlogits: Tensor | None = None,
    ) -> Tensor:
        """The gradient ``[N, V]`` of the statistics.

        Args:
            state: of the whole rows, from `token_stats_fwd` or `reference.merge_states`.
            grads: upstream gradients ``[N]`` of logp, entropy, unit polarity and lse; None stands
                for zero. Infinite ones count as the largest number of the accumulation dtype, so
                that what is 0 in the row's gradient stays 0.
            dlogits: where to write. It may be the logits, and have one of the dtypes of
                `Capabilities.half_gradients` where those are float32. None: a new contiguous tensor
                of the logits' dtype.
        """

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
        """The policy loss per token and, where `dlogits` is given, the gradient of its sum.

        A row with target -100, or whose weights are 0 in every term, is not read and contributes
        exactly 0. Nor does a factor of 0 give anything but 0 where another overflows.

        Args:
            dlogits: as for `token_stats_bwd`; None: no gradient.
            state: as for `token_stats_fwd`.

        Returns:
            token_loss (token_weight applied), logp, entropy, unit_polarity, polarity, weight,
            ratio, each ``[N]`` in the accumulation dtype, and clip_side (uint8 ``[N]``).
        """

    def scale_(self, dlogits: Tensor, factor: Tensor) -> None:
        """``dlogits *= factor`` for a 0-dim `factor` on the same device. A factor of 1 changes no
        bit; one of 0 gives zeros, infinite elements or not. An infinite one counts as the largest
        number of the accumulation dtype."""
