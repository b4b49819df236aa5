"""The Triton backend, for GPU tensors: NVIDIA GPUs without the compiled extension, and AMD GPUs.

CPU tensors are served where the process runs with ``TRITON_INTERPRET=1``. Calls run on the current
stream of the logits' device, whichever device is current, and never synchronize. They allocate only
what they return and, where rows are few, their segments' states. They may be captured in a CUDA
graph.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from papo_kernels.backends.protocol import MOST_GPU_COLUMNS, Capabilities
from papo_kernels.checks import GPU_DTYPES, HALF_DTYPES
from papo_kernels.objective import Objective
from papo_kernels.types import RowParams, TokenInputs, WeightingInputs


class TritonBackend:
    """The `Backend` of the kernels in this package, which are imported when it is first chosen."""

    name = "triton"
    capabilities = Capabilities(("cuda", "cpu"), GPU_DTYPES, HALF_DTYPES, MOST_GPU_COLUMNS)

    @cached_property
    def _stats(self) -> Any:
        from . import token_stats

        return token_stats

    @cached_property
    def _loss(self) -> Any:
        from . import fused_loss

        return fused_loss

    def why_unavailable(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the triton package is not installed"
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it serves GPU tensors (CPU tensors only with TRITON_INTERPRET=1)"
        # A triton that is there and broken is an error of the choice, not of the first call.
        _ = self._stats, self._loss
        return None

    def token_stats_fwd(
        self, logits: Tensor, targets: Tensor, row: RowParams, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        self.capabilities.check(logits)
        return self._stats.token_stats_fwd(logits, targets, row, state)

    def token_stats_bwd(
        self,
        logits: Tensor,
        targets: Tensor,
        state: Tensor,
        grads: Sequence[Tensor | None],
        row: RowParams,
        dlogits: Tensor | None = None,
    ) -> Tensor:
        self.capabilities.check(logits, dlogits)
        return self._stats.token_stats_bwd(logits, targets, state, grads, row, dlogits)

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
        return self._loss.policy_loss_fwd(
            logits, targets, tokens, objective, weighting, row, dlogits, state
        )

    def scale_(self, dlogits: Tensor, factor: Tensor) -> None:
        self.capabilities.check(dlogits)
        self._loss.scale_(dlogits, factor)


TRITON = TritonBackend()
