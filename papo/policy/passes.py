"""One micro-batch through the policy: statistics without gradient, or the loss.

Both go through the engine's one forward method, and so through the same module and the same
kernels: the first update's ratio is exactly 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from papo.policy.batch import MicroBatch
from papo_kernels import PolarityWeighting, PolicyLossOutput, PolicyLossParams, TokenStats

MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "segment_ids",
    "logit_index",
    "targets",
    "keep_offsets",
    "keep_ids",
)
LOSS_INPUTS = ("advantages", "token_weight", "old_logp", "ref_logp")


class ForwardEngine(Protocol):
    """What passes need of `papo.dist.engine.Engine`."""

    @property
    def dropout(self) -> bool:
        """Whether passes with gradient see another policy than those without."""

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        """`papo.policy.objective.Policy.forward`."""

    def train(self, mode: bool = True) -> None:
        """Switch dropout and the like."""


@contextlib.contextmanager
def evaluating(engine: ForwardEngine) -> Iterator[None]:
    """Passes in evaluation mode: the policy's own distribution, nothing drops out."""
    engine.train(False)
    try:
        yield
    finally:
        engine.train(True)


def stats_of(engine: ForwardEngine, batch: MicroBatch) -> TokenStats:
    """Statistics of a micro-batch's tokens, float32 [N] each, without gradient."""
    with torch.no_grad():
        return TokenStats(*engine.forward(_named(batch, MODEL_INPUTS)))


def loss_of(
    engine: ForwardEngine,
    batch: MicroBatch,
    objective: PolicyLossParams,
    weighting: PolarityWeighting | None,
) -> PolicyLossOutput:
    """Policy loss of a micro-batch; `loss` is the sum of token_weight times the token's loss."""
    model_inputs, loss_inputs = _named(batch, MODEL_INPUTS), _named(batch, LOSS_INPUTS)
    return PolicyLossOutput(*engine.forward(model_inputs, loss_inputs, objective, weighting))


def _named(batch: MicroBatch, names: tuple[str, ...]) -> dict[str, Tensor | None]:
    return {name: getattr(batch, name) for name in names}
