"""Policies under torch's own AdamW, one of them a table of logits, with the engine's methods that a
step calls: its effects without DeepSpeed.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from papo.config import OptimConfig, WeightingConfig
from papo.policy.batch import Batcher, TrainingSequence
from papo.policy.module import Policy
from papo.policy.update import Update
from papo.policy.weighting import WeightController
from papo.train.entropy import EntropyMeasurement
from papo.train.stats import Passes, Pieces
from papo.train.step import Updater
from papo_kernels import Objective, policy_loss, token_stats

VOCABULARY = 16


class PlainEngine:
    """What becomes of gradients.

    Attributes:
        average: of the gradients, as `average_gradient` was given them, one for each parameter;
            empty before the first.
    """

    def __init__(self, optim: OptimConfig, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.average: list[Tensor] = []
        self._sum_of_shares = 0.0
        self._optim = optim
        self.adamw = torch.optim.AdamW(
            parameters, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )

    @property
    def trained_numel(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float, *, blocked: bool) -> Any:
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self._optim.max_grad_norm))
        applied = not blocked and math.isfinite(norm)
        self.adamw.param_groups[0]["lr"] = lr
        before = [p.detach().clone() for p in self.parameters]
        if applied:
            self.adamw.step()
        self.adamw.zero_grad()
        first_order = math.nan
        if applied and self.average:
            triples = zip(self.average, self.parameters, before, strict=True)
            first_order = float(sum((a * (p.detach() - b)).sum() for a, p, b in triples))
        return SimpleNamespace(grad_norm=norm, applied=applied, first_order=first_order)

    @property
    def has_average(self) -> bool:
        return bool(self.average)

    def average_gradient(self, decay: float) -> float:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            self._sum_of_shares = decay * self._sum_of_shares + 1 - decay
            share = (1 - decay) / self._sum_of_shares
            kept = self.average or gradients
            self.average = [a + share * (g - a) for a, g in zip(kept, gradients, strict=True)]
        self.adamw.zero_grad()
        return norm


class Bigram(PlainEngine):
    """The logits of a token are the row of the token before it.

    Attributes:
        evaluated: mode of each pass, True in evaluation.
    """

    dropout = False

    def __init__(self, optim: OptimConfig, logits: Tensor) -> None:
        self.table = logits.clone().requires_grad_()
        self.evaluated: list[bool] = []
        self._evaluating = False
        super().__init__(optim, [self.table])

    def train(self, mode: bool = True) -> None:
        self._evaluating = not mode

    def forward(
        self,
        batch: dict[str, Tensor],
        tokens: Any = None,
        objective: Any = None,
        weighting: Any = None,
    ) -> Any:
        self.evaluated.append(self._evaluating)
        logits = self.table[batch["input_ids"].flatten()[batch["logit_index"]]]
        if tokens is None:
            return token_stats(logits, batch["targets"])
        return policy_loss(
            logits, batch["targets"], **tokens, objective=objective, weighting=weighting
        )


class PolicyEngine(PlainEngine):
    """A transformers model in the trainer's own policy."""

    def __init__(self, optim: OptimConfig, policy: Policy) -> None:
        super().__init__(optim, list(policy.parameters()))
        self.dropout = policy.dropout
        self.forward, self.train = policy.forward, policy.train
        self.train(True)


BATCHER = Batcher(pad_id=0, max_row_tokens=0, device=torch.device("cpu"))


def passes(engine: Any, size: int = 64) -> Passes:
    return Passes(engine, BATCHER, size)


def update(
    engine: Any, pieces: Pieces, lr: float = 1e-2, objective: Objective | None = None
) -> Update:
    controller = WeightController(WeightingConfig())
    updater = Updater(engine, BATCHER, objective or Objective(), controller)
    return updater.update(pieces, None, lr)


def run_update(
    engine: Any,
    sequences: list[TrainingSequence],
    size: int = 64,
    objective: Objective | None = None,
) -> Update:
    """An update on `sequences`, `size` of them in a micro-batch."""
    return update(engine, passes(engine, size).pieces(sequences), objective=objective)


def measured_update(
    engine: Any,
    sequences: list[TrainingSequence],
    tokens: int = 0,
    *,
    size: int = 64,
    lr: float = 1e-2,
) -> tuple[Update, EntropyMeasurement]:
    """The same with what is to measure its entropy change."""
    over = passes(engine, size)
    pieces = over.pieces(sequences)
    measurement = EntropyMeasurement.of(over, pieces, tokens)
    return update(engine, pieces, lr), measurement
