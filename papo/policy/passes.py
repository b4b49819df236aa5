"""One micro-batch through the policy: statistics without gradient, or the loss.

Both go through the engine's one forward method, and so through the same module and the same
kernels: the first update's ratio is exactly 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from papo.policy.batch import LossInputs, MicroBatch, ModelInputs
from papo_kernels import Objective, PolarityWeighting, PolicyLossOutput, TokenStats


class ForwardEngine(Protocol):
    """What passes need of `papo.dist.engine.Engine`, or of a `Policy` without one."""

    @property
    def dropout(self) -> bool:
        """Whether passes with gradient see another policy than those without."""

    def forward(
        self,
        batch: ModelInputs,
        tokens: LossInputs | None = None,
        objective: Objective | None = None,
        weighting: PolarityWeighting | None = None,
    ) -> tuple[Tensor, ...]:
        """`papo.policy.module.Policy.forward`."""

    def train(self, mode: bool = True) -> object:
        """Switch dropout and the like."""


class MovableEngine(ForwardEngine, Protocol):
    """An engine whose weights can be moved for a pass."""

    @property
    def computes_in_bf16(self) -> bool:
        """Whether weights and activations of a pass are bfloat16."""

    @property
    def has_average(self) -> bool:
        """Whether a kept average of a gradient exists; the same on every rank."""

    def moved_along_average(self, change: float) -> AbstractContextManager[None]:
        """Forward passes inside see weights moved along the kept average, scaled as by AdamW.

        The weights come back bit for bit.

        Args:
            change: first-order change of what the average is the gradient of; in nats for an
                entropy's.
        """


@contextlib.contextmanager
def evaluating(engine: ForwardEngine) -> Iterator[None]:
    """Passes in evaluation mode: the policy's own distribution, nothing drops out."""
    engine.train(False)
    try:
        yield
    finally:
        engine.train(True)


def stats_of(engine: ForwardEngine, batch: MicroBatch, *, gradient: bool = False) -> TokenStats:
    """Statistics of a micro-batch's tokens, float32 [N] each; log-prob and entropy with a gradient
    where it is asked for."""
    with torch.set_grad_enabled(gradient):
        return TokenStats(*engine.forward(batch.model_inputs()))


def loss_of(
    engine: ForwardEngine,
    batch: MicroBatch,
    objective: Objective,
    weighting: PolarityWeighting | None,
) -> PolicyLossOutput:
    """Policy loss of a micro-batch; `loss` is the sum of token_weight times the token's loss."""
    inputs = batch.model_inputs(), batch.loss_inputs(objective.ratio_level)
    return PolicyLossOutput(*engine.forward(*inputs, objective, weighting))
