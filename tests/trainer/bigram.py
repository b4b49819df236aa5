"""A language model of one table of logits under torch's own AdamW, with the engine's methods that
an update calls: a step's effects without DeepSpeed.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from papo.config.options import OptimConfig
from papo.policy.batch import TrainingSequence, collate
from papo.policy.weighting import WeightController
from papo.train.step import Update, update
from papo_kernels import PolicyLossParams, policy_loss, token_stats

VOCABULARY = 16


class Bigram:
    """The logits of a token are the row of the token before it.

    Attributes:
        evaluated: mode of each pass, True in evaluation.
    """

    dropout = False

    def __init__(self, optim: OptimConfig, logits: Tensor) -> None:
        self.table = logits.clone().requires_grad_()
        self.evaluated: list[bool] = []
        self._optim = optim
        self._evaluating = False
        self.adamw = torch.optim.AdamW(
            [self.table], betas=optim.betas, eps=optim.eps, weight_decay=0.0
        )

    def train(self, mode: bool = True) -> None:
        self._evaluating = not mode

    def forward(
        self,
        batch: dict[str, Tensor],
        tokens: Any = None,
        params: Any = None,
        weighting: Any = None,
    ) -> Any:
        self.evaluated.append(self._evaluating)
        logits = self.table[batch["input_ids"].flatten()[batch["logit_index"]]]
        if tokens is None:
            return token_stats(logits, batch["targets"])
        return policy_loss(logits, batch["targets"], **tokens, params=params, weighting=weighting)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float, *, blocked: bool) -> Any:
        norm = float(torch.nn.utils.clip_grad_norm_([self.table], self._optim.max_grad_norm))
        applied = not blocked and math.isfinite(norm)
        self.adamw.param_groups[0]["lr"] = lr
        if applied:
            self.adamw.step()
        self.adamw.zero_grad()
        return SimpleNamespace(grad_norm=norm, applied=applied)


def make_batch(part: Any) -> Any:
    return collate(part, pad_id=0, max_row_tokens=0)


def run_update(engine: Any, sequences: list[TrainingSequence], **options: Any) -> Update:
    """An update on `sequences`, in one micro-batch where `options` say nothing else."""
    controller = WeightController(
        SimpleNamespace(strength=0.5, shape="sign", dead_zone=1e-6, conserve=True, sigma_decay=0.95)
    )
    return update(
        engine,
        sequences,
        make_batch,
        **{
            "micro_batch_size": 64,
            "params": PolicyLossParams(),
            "weighting": None,
            "controller": controller,
            "lr": 1e-2,
            **options,
        },
    )
