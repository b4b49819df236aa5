"""The reference backend: the eager float64 definitions, on any device."""

from __future__ import annotations

import torch

from papo_kernels import reference
from papo_kernels.checks import HALF_DTYPES

from .protocol import Capabilities


class ReferenceBackend:
    """The functions of `papo_kernels.reference` as a backend."""

    name = "reference"
    capabilities = Capabilities(half_gradients=HALF_DTYPES)

    def why_unavailable(self, device: torch.device) -> str | None:
        return None

    token_stats_fwd = staticmethod(reference.token_stats_fwd)
    token_stats_bwd = staticmethod(reference.token_stats_bwd)
    policy_loss_fwd = staticmethod(reference.policy_loss_fwd)
    scale_ = staticmethod(reference.scale_)


REFERENCE = ReferenceBackend()
