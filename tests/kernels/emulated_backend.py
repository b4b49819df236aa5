"""The CUDA kernels on the machine of cuda_emulator.py, as backends of their own names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from papo_kernels.backends import choice
from papo_kernels.backends.native import CUDA
from tests.kernels.cuda_emulator import emulated

# The same call in the three ways there are to run it; the device's limits decide.
DEVICES: dict[str, dict[str, int]] = {
    # Blocks of 12 KB hold three rows: a row's sums run ahead of the gradient before it.
    "emulated": {},
    # Two buffers fit at most: sums and gradient of a row follow each other.
    "emulated_in_turn": {"shared_per_block": 9000, "shared_per_multiprocessor": 6000},
    "emulated_no_clusters": {"max_cluster": 0},
}


class EmulatedBackend:
    """The backend "cuda" for CPU tensors, on one of `DEVICES`."""

    capabilities = replace(CUDA.capabilities, devices=("cpu",))

    def __init__(self, name: str) -> None:
        self.name = name

    def why_unavailable(self, device: torch.device) -> str | None:
        return None

    def token_stats_fwd(self, *args: Any) -> Any:
        with emulated(**DEVICES[self.name]):
            return CUDA.token_stats_fwd(*args)

    def token_stats_bwd(self, *args: Any) -> Any:
        with emulated(**DEVICES[self.name]):
            return CUDA.token_stats_bwd(*args)

    def policy_loss_fwd(self, *args: Any) -> Any:
        with emulated(**DEVICES[self.name]):
            return CUDA.policy_loss_fwd(*args)

    def scale_(self, *args: Any) -> None:
        with emulated(**DEVICES[self.name]):
            CUDA.scale_(*args)


@contextlib.contextmanager
def registered(name: str) -> Iterator[None]:
    """A call may ask for the emulated backend of this name."""
    backend = EmulatedBackend(name)
    with (
        mock.patch.dict(choice._BY_NAME, {name: lambda: backend}),
        mock.patch.object(choice, "BACKENDS", (*choice.BACKENDS, name)),
    ):
        yield
