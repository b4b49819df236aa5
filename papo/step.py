"""One optimizer update: micro-batches forward and backward, global sums, clip, step or skip."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from papo import collectives
from papo.batch import MicroBatch, TrainingSequence, micro_batches
from papo.objective import loss_of, stats_of
from papo.probe import check_sampler_kl
from papo.stats import pass_count
from papo.weighting import BranchSums, WeightController, branch_sums
from papo_kernels import PolarityWeighting, PolicyLossOutput, PolicyLossParams

MakeBatch = Callable[[Sequence[TrainingSequence]], MicroBatch]


@dataclass(frozen=True)
class TokenSums:
    """Sums over tokens that train. The vector that is reduced has the order of the fields."""

    tokens: float
    loss: float
    entropy: float
    ratio: float
    clip_low: float
    clip_high: float
    sampler_kl: float
    absolute_advantage: float

    @classmethod
    def of(cls, out: PolicyLossOutput, batch: MicroBatch) -> Tensor:
        """The sums of one micro-batch as a float64 vector on the batch's device."""
        live = batch.token_weight > 0
        # A finite stand-in keeps the estimator from turning one masked-out token into NaN.
        gap = torch.where(live, batch.sampler_logp - out.logp, 0.0).double()
        rows = (
            live.double(),
            out.entropy.double(),
            out.ratio.double(),
            (out.clipped & (batch.advantages < 0)).double(),
            (out.clipped & (batch.advantages > 0)).double(),
            # k3 estimate of KL(sampler || policy): samples come from the sampler.
            torch.expm1(-gap) + gap,
            batch.advantages.abs().double(),
        )
        tokens, *rest = (torch.where(live, row, 0.0).sum() for row in rows)
        return torch.stack([tokens, out.loss.detach().double(), *rest])

    def mean(self, value: float) -> float:
        """`value` per token."""
        return value / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Probe:
    """Completions whose entropy is measured again after the step; the tensors are [N] tokens."""

    sequences: Sequence[TrainingSequence]
    live: Tensor
    entropy: Tensor
    predicted: Tensor

    @classmethod
    def of(
        cls,
        sequences: Sequence[TrainingSequence],
        batch: MicroBatch,
        out: PolicyLossOutput,
        tokens: int,
    ) -> Probe:
        """The first completions of a micro-batch that together have at least `tokens` tokens.

        Keeps their entropy before the step and its predicted change per unit of step in logit
        space.
        """
        ends = list(accumulate(len(s.response_ids) for s in sequences))
        kept = next((i + 1 for i, end in enumerate(ends) if end >= tokens), len(sequences))
        predicted = torch.where(out.clipped, 0.0, out.weight * out.polarity)
        first = slice(ends[kept - 1])
        live = batch.token_weight[first] > 0
        return cls(sequences[:kept], live, out.entropy[first], predicted[first])

    def deltas(self, engine: Any, make_batch: MakeBatch) -> tuple[float, float]:
        """Mean predicted and measured change (nats) over the ranks' tokens; a collective."""
        engine.train(False)
        change = stats_of(engine, make_batch(self.sequences)).entropy - self.entropy
        engine.train(True)
        rows = (torch.ones_like(change), self.predicted, change)
        sums = torch.stack([torch.where(self.live, row, 0.0).double().sum() for row in rows])
        tokens, predicted, measured = collectives.all_sum(sums).tolist()
        return predicted / max(1.0, tokens), measured / max(1.0, tokens)


@dataclass(frozen=True)
class Update:
    """What one update did. `reason` says why a step was skipped, empty when it was applied.

    `sums` and `branches` are over all ranks. `probe` is None where nothing is to be measured, the
    deltas are None until `measured`.
    """

    sums: TokenSums
    branches: BranchSums
    grad_norm: float
    reason: str
    probe: Probe | None
    predicted_delta: float | None = None
    measured_delta: float | None = None

    @property
    def applied(self) -> bool:
        """Whether weights changed."""
        return not self.reason

    def measured(self, engine: Any, make_batch: MakeBatch) -> Update:
        """This update with the deltas of its probe, if there is one; a collective."""
        if self.probe is None:
            return self
        predicted, measured = self.probe.deltas(engine, make_batch)
        return replace(self, predicted_delta=predicted, measured_delta=measured)


def update(
    engine: Any,
    sequences: Sequence[TrainingSequence],
    make_batch: MakeBatch,
    *,
    micro_batch_size: int,
    params: PolicyLossParams,
    weighting: PolarityWeighting | None,
    controller: WeightController,
    lr: float,
    probe_tokens: int = 0,
    max_sampler_kl: float = math.inf,
) -> Update:
    """Forward, backward and step over `sequences`; a collective, with as many passes on every rank.

    Args:
        sequences: this rank's part of the mini-batch; token weights already span the global
            mini-batch.
        weighting: what the kernel weights with; `controller` only says what h is for the branch
            statistics.
        probe_tokens: tokens of this rank to measure the step's entropy change on; 0 for none.
        max_sampler_kl: bound of the KL to the sampler, for an update with the sampler's weights.

    Raises:
        PapoError: the KL is beyond the bound; nothing has changed.
    """
    total = torch.zeros(len(fields(TokenSums)), dtype=torch.float64)
    branches = torch.zeros(BranchSums.size(), dtype=torch.float64)
    probe: Probe | None = None
    count = pass_count(sequences, micro_batch_size)
    for i, piece in enumerate(micro_batches(sequences, micro_batch_size, count=count)):
        batch = make_batch(piece)
        out = loss_of(engine, batch, params, weighting)
        engine.backward(out.loss, last=i == count - 1)
        total += TokenSums.of(out, batch).cpu()
        branches += _branches(out, batch, controller).cpu()
        if i == 0 and probe_tokens:
            probe = Probe.of(piece, batch, out, probe_tokens)
    sums = TokenSums(*collectives.all_sum(total).tolist())
    check_sampler_kl(sums.mean(sums.sampler_kl), max_sampler_kl)
    reason = "" if math.isfinite(sums.loss) else f"loss is {sums.loss}"
    if not sums.tokens:
        # Momentum and weight decay would move the weights all the same.
        reason = "no token to train on"
    result = engine.step(lr, blocked=bool(reason))
    if not reason and not result.applied:
        reason = f"gradient norm is {result.grad_norm}"
    over_ranks = BranchSums.from_tensor(collectives.all_sum(branches))
    return Update(sums, over_ranks, result.grad_norm, reason, probe)


def _branches(out: PolicyLossOutput, batch: MicroBatch, controller: WeightController) -> Tensor:
    """Branch sums of a micro-batch, before and after weighting wherever the weights were applied.

    With weights from the old policy's pass they are in the advantages already (`batch.factor`):
    they are taken out again for what is "before".
    """
    factor = torch.ones_like(out.weight) if batch.factor is None else batch.factor
    polarity = out.polarity / factor
    h = controller.shape_of(polarity, out.unit_polarity)
    live = batch.token_weight > 0
    return branch_sums(
        polarity, batch.advantages / factor, out.weight * factor, live, out.clipped, h
    )
