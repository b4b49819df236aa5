"""What one optimizer update was: sums over its tokens, the gradient's norm, the entropy change that
it should make and the one that it made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from papo.policy.batch import MicroBatch
from papo.policy.weighting import BranchSums
from papo_kernels import LogProbs, Objective, policy_loss
from papo_kernels.types import CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW

if TYPE_CHECKING:
    from papo_kernels import PolicyLossOutput


class TokenSums(NamedTuple):
    """Sums over the tokens that train.

    Attributes:
        tokens: how many there are.
        loss: token weight times the token's loss.
        entropy: nats.
        ratio: importance ratio.
        clip_low, clip_high, clip_dual: tokens on which that bound acted.
        sampler_kl: see `sampler_kl`, nats.
        absolute_advantage: |A|, weights of the old policy included.
        predicted: polarity's prediction of the entropy change of a step along the policy term's
            gradient (papo/policy/prediction.py).
    """

    tokens: float
    loss: float
    entropy: float
    ratio: float
    clip_low: float
    clip_high: float
    clip_dual: float
    sampler_kl: float
    absolute_advantage: float
    predicted: float

    @classmethod
    def of(cls, sums: Mapping[str, float]) -> TokenSums:
        """Its fields, found by name among the sums of an update."""
        return cls(*(sums[name] for name in cls._fields))

    @classmethod
    def total(cls, parts: Sequence[TokenSums]) -> TokenSums:
        """The sums of several updates together."""
        return cls(*map(sum, zip(*parts, strict=True)))

    def mean(self, value: float) -> float:
        """`value` per token, NaN where there is none."""
        return value / self.tokens if self.tokens else math.nan


def policy_gradient(out: PolicyLossOutput, batch: MicroBatch, objective: Objective) -> Tensor:
    """The derivative of a micro-batch's policy term by each token's log-prob, its token weight
    included; [N] like `out.logp`.

    Exactly 0 where the surrogate clips a token's gradient away.
    """
    inputs = batch.loss_inputs(objective.ratio_level)
    inputs["advantages"] = out.weight * batch.advantages
    surrogate = replace(objective, kl_coef=0.0, entropy_coef=0.0)
    with torch.enable_grad():
        logp = out.logp.detach().requires_grad_()
        loss = policy_loss(LogProbs(logp), batch.targets, **inputs, objective=surrogate).loss
        return torch.autograd.grad(loss, logp)[0]


def token_sums(out: PolicyLossOutput, batch: MicroBatch, gradient: Tensor) -> dict[str, Tensor]:
    """The fields of `TokenSums` for one micro-batch, to be added up.

    0-dim float64 on its device. `gradient`: see `policy_gradient`.
    """
    live = batch.live
    rows = {
        "tokens": live.double(),
        "entropy": out.entropy.double(),
        "ratio": out.ratio.double(),
        "clip_low": (out.clip_side == CLIPPED_LOW).double(),
        "clip_high": (out.clip_side == CLIPPED_HIGH).double(),
        "clip_dual": (out.clip_side == CLIPPED_DUAL).double(),
        "sampler_kl": sampler_kl(batch.sampler_logp, out.logp, live),
        "absolute_advantage": batch.advantages.abs().double(),
        "predicted": -gradient.double() * out.unit_polarity,
    }
    sums = {name: torch.where(live, row, 0.0).sum() for name, row in rows.items()}
    return {**sums, "loss": out.loss.detach().double()}


def sampler_kl(sampler_logp: Tensor, logp: Tensor, live: Tensor) -> Tensor:
    """k3 estimate of KL(sampler || policy) at each token, float64 [N] in nats.

    The sampler is first because the samples are its own. 0 where `live` is False, whatever the
    other two hold there.
    """
    # A finite stand-in keeps the estimator from turning one masked-out token into NaN.
    gap = torch.where(live, sampler_logp - logp, 0.0).double()
    return torch.expm1(-gap) + gap


@dataclass(frozen=True)
class Update:
    """What one update did.

    Attributes:
        sums, branches: over all ranks.
        grad_norm: before clipping.
        lr: its learning rate.
        reason: why it was skipped, empty where it was applied.
        first_order: the averaged gradient of the mean entropy times the change of the weights,
            nats; NaN where there is no average or it was skipped.
        measured_delta: mean entropy after it minus before, nats; None where it was not measured.
    """

    sums: TokenSums
    branches: BranchSums
    grad_norm: float
    lr: float
    reason: str = ""
    first_order: float = math.nan
    measured_delta: float | None = None

    @property
    def applied(self) -> bool:
        """Whether weights changed."""
        return not self.reason
