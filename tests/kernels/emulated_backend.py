"""The CUDA kernels on the machine of cuda_emulator.py, as a backend of its own name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from papo_kernels.backends import choice
from papo_kernels.backends.native import CUDA
from tests.kernels.cuda_emulator import H100, emulated

LIMITS = {name: getattr(H100, name) for name, _ in H100._fields_[1:]}


class EmulatedBackend:
    """The backend "cuda" for CPU tensors, on a device of an H100's limits."""

    name = "emulated"
    capabilities = replace(CUDA.capabilities, devices=("cpu",))

    def why_unavailable(self, device: torch.device) -> str | None:
        return None

    def token_stats_fwd(self, *args: Any) -> Any:
        with emulated(**LIMITS):
            return CUDA.token_stats_fwd(*args)

    def token_stats_bwd(self, *args: Any) -> Any:
        with emulated(**LIMITS):
            return CUDA.token_stats_bwd(*args)

    def policy_loss_fwd(self, *args: Any) -> Any:
        with emulated(**LIMITS):
            return CUDA.policy_loss_fwd(*args)

    def scale_(self, *args: Any) -> None:
        with emulated(**LIMITS):
            CUDA.scale_(*args)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """A call may ask for ``backend="emulated"``."""
    backend = EmulatedBackend()
    with (
        mock.patch.dict(choice._BY_NAME, {backend.name: lambda: backend}),
        mock.patch.object(choice, "BACKENDS", (*choice.BACKENDS, backend.name)),
    ):
        yield
