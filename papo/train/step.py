"""One optimizer update: micro-batches forward and backward, global sums, clip, step or skip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from papo.dist import collectives
from papo.policy.batch import Batcher, MicroBatch
from papo.policy.passes import ForwardEngine, loss_of
from papo.policy.update import TokenSums, Update, policy_gradient, token_sums
from papo.policy.weighting import BranchSums, WeightController, branch_sums
from papo.train.probe import check_sampler_kl
from papo.train.stats import Pieces
from papo_kernels import Objective, PolarityWeighting, PolicyLossOutput

if TYPE_CHECKING:
    from papo.dist.engine import StepResult


class TrainingEngine(ForwardEngine, Protocol):
    """What an update needs of `papo.dist.engine.Engine`."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of `loss`; `last` marks the step's last micro-batch."""

    def step(self, lr: float, *, blocked: bool) -> StepResult:
        """Clip, update (unless `blocked` or the gradient is not finite) and clear the gradients."""

    def average_gradient(self, decay: float) -> float:
        """Fold what `backward` has accumulated into the kept average, in place of a step; its norm.

        Weights and AdamW's state stay as they are. A `step` tells the average's inner product with
        the change of the weights (`StepResult.first_order`).

        Args:
            decay: of the bias-corrected average, in [0, 1).
        """


@dataclass(frozen=True)
class Updater:
    """Makes a run's updates.

    Attributes:
        controller: computes h for the branches' sums.
    """

    engine: TrainingEngine
    batcher: Batcher
    objective: Objective
    controller: WeightController

    def update(
        self,
        pieces: Pieces,
        weighting: PolarityWeighting | None,
        lr: float,
        max_sampler_kl: float = math.inf,
    ) -> Update:
        """Forward, backward and step over a mini-batch; a collective.

        Args:
            pieces: this rank's micro-batches, as many on every rank; their token weights span the
                global mini-batch.
            weighting: what the loss kernel weights with.
            max_sampler_kl: bound of the KL to the sampler, for an update with the sampler's
                weights.

        Raises:
            PapoError: the KL is beyond the bound; nothing has changed.
        """
        totals: dict[str, Tensor] = {}
        for i, piece in enumerate(pieces):
            batch = self.batcher.batch(piece)
            out = loss_of(self.engine, batch, self.objective, weighting)
            self.engine.backward(out.loss, last=i == len(pieces) - 1)
            gradient = policy_gradient(out, batch, self.objective)
            sums = token_sums(out, batch, gradient) | self._branch_sums(out, batch, gradient)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
        named = collectives.sum_named(totals)
        total, branches = TokenSums.of(named), BranchSums.of(named)
        check_sampler_kl(total.mean(total.sampler_kl), max_sampler_kl)
        reason = "" if math.isfinite(total.loss) else f"loss is {total.loss}"
        if not total.tokens:
            # Momentum and weight decay would move the weights all the same.
            reason = "no token to train on"
        result = self.engine.step(lr, blocked=bool(reason))
        if not reason and not result.applied:
            reason = f"gradient norm is {result.grad_norm}"
        return Update(total, branches, result.grad_norm, lr, reason, result.first_order)

    def _branch_sums(
        self, out: PolicyLossOutput, batch: MicroBatch, gradient: Tensor
    ) -> dict[str, Tensor]:
        """Branch sums of a micro-batch, before and after weighting, wherever that happened.

        Weights from the old policy (`batch.factor`) are in the advantages already. They are divided
        out again for what is "before". Where shared polarity made them, the sums are of it too.
        """
        factor = torch.ones_like(out.weight) if batch.factor is None else batch.factor
        advantages = batch.advantages / factor
        if batch.unit_polarity is None:
            polarity, unit_polarity = out.polarity / factor, out.unit_polarity
        else:
            polarity, unit_polarity = advantages * batch.unit_polarity, batch.unit_polarity
        return branch_sums(
            polarity,
            advantages,
            out.weight * factor,
            batch.live,
            out.clipped & (gradient == 0),
            self.controller.shape_of(polarity, unit_polarity),
        )
