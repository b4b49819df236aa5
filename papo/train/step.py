"""One optimizer update: micro-batches forward and backward, global sums, clip, step or skip."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from papo.dist import collectives
from papo.model.probe import check_sampler_kl
from papo.policy.batch import MicroBatch, TrainingSequence, micro_batches
from papo.policy.objective import evaluating, loss_of, sampler_kl, stats_of
from papo.policy.prediction import UpdateEffect
from papo.policy.weighting import BranchSums, WeightController, branch_sums
from papo.train.stats import pass_count
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
    predicted: float

    @classmethod
    def of(cls, out: PolicyLossOutput, batch: MicroBatch) -> Tensor:
        """The sums of one micro-batch as a float64 vector on the batch's device."""
        live = batch.token_weight > 0
        rows = (
            live.double(),
            out.entropy.double(),
            out.ratio.double(),
            (out.clipped & (batch.advantages < 0)).double(),
            (out.clipped & (batch.advantages > 0)).double(),
            sampler_kl(batch.sampler_logp, out.logp, live),
            batch.advantages.abs().double(),
            # The first-order entropy change (papo/policy/prediction.py), as linear in the tokens
            # as the gradient is: with its weights.
            batch.token_weight.double() * torch.where(out.clipped, 0.0, out.weight * out.polarity),
        )
        tokens, *rest = (torch.where(live, row, 0.0).sum() for row in rows)
        return torch.stack([tokens, out.loss.detach().double(), *rest])

    def mean(self, value: float) -> float:
        """`value` per token."""
        return value / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class EntropyProbe:
    """Micro-batches whose entropy is measured again after the update.

    Before and after are passes over the same rows of the same shapes, so that what differs is the
    weights' doing and not a product's rounding.

    Attributes:
        pieces: as many on every rank.
        entropy: their tokens' mean entropy before, in nats over all ranks; None where the update's
            own forward pass gives it: they are its pieces, and nothing drops out.
    """

    pieces: Sequence[Sequence[TrainingSequence]]
    entropy: float | None = None

    @classmethod
    def of(
        cls,
        engine: Any,
        pieces: Sequence[Sequence[TrainingSequence]],
        make_batch: MakeBatch,
        *,
        micro_batch_size: int,
        tokens: int,
    ) -> EntropyProbe:
        """For about `tokens` tokens of all ranks, 0 for all of the update's; a collective."""
        sequences = [s for piece in pieces for s in piece if s.weight > 0]
        mine = torch.tensor(sum(len(s.response_ids) for s in sequences))
        share = tokens / max(1.0, float(collectives.all_sum(mine)))
        if not tokens or share >= 1:
            return cls(pieces, mean_entropy(engine, pieces, make_batch) if engine.dropout else None)
        sampled = _in_pieces(spread(sequences, share), micro_batch_size)
        return cls(sampled, mean_entropy(engine, sampled, make_batch))


def spread(sequences: Sequence[TrainingSequence], share: float) -> list[TrainingSequence]:
    """A share of `sequences`, rounded up, at equal distances from the first to the last."""
    n = len(sequences)
    count = math.ceil(share * n)
    return [sequences[(2 * i + 1) * n // (2 * count)] for i in range(count)]


def mean_entropy(
    engine: Any, pieces: Sequence[Sequence[TrainingSequence]], make_batch: MakeBatch
) -> float:
    """Mean entropy in nats over all ranks' tokens that train; a collective, without gradient."""
    total = torch.zeros(2, dtype=torch.float64)
    with evaluating(engine):
        for piece in pieces:
            batch = make_batch(piece)
            live = batch.token_weight > 0
            entropy = torch.where(live, stats_of(engine, batch).entropy.double(), 0.0)
            total += torch.stack([live.double().sum(), entropy.sum()]).cpu()
    tokens, entropies = collectives.all_sum(total).tolist()
    return entropies / max(1.0, tokens)


@dataclass(frozen=True)
class Update:
    """What one update did. `reason` says why a step was skipped, empty when it was applied.

    `sums` and `branches` are over all ranks, `grad_norm` is before clipping. `probe` is None where
    nothing is to be measured, `measured_delta` (nats) is None until `measured`.
    """

    sums: TokenSums
    branches: BranchSums
    grad_norm: float
    reason: str
    lr: float
    probe: EntropyProbe | None = None
    measured_delta: float | None = None

    @property
    def applied(self) -> bool:
        """Whether weights changed."""
        return not self.reason

    @property
    def effect(self) -> UpdateEffect:
        """What the prediction of entropy changes learns from it."""
        return UpdateEffect(self.sums.predicted, self.grad_norm, self.lr, self.measured_delta)

    def measured(self, engine: Any, make_batch: MakeBatch) -> Update:
        """This update with the change of its probe's entropy, if there is one and weights changed;
        a collective."""
        if self.probe is None or not self.applied:
            return self
        before = self.probe.entropy
        if before is None:
            before = self.sums.mean(self.sums.entropy)
        after = mean_entropy(engine, self.probe.pieces, make_batch)
        return replace(self, measured_delta=after - before)


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
    probe_tokens: int | None = None,
    max_sampler_kl: float = math.inf,
) -> Update:
    """Forward, backward and step over `sequences`; a collective, with as many passes on every rank.

    Args:
        sequences: this rank's part of the mini-batch; token weights already span the global
            mini-batch.
        weighting: what the kernel weights with; `controller` only says what h is for the branch
            statistics.
        probe_tokens: tokens of all ranks to measure the entropy change on, 0 for all of them; None
            measures nothing.
        max_sampler_kl: bound of the KL to the sampler, for an update with the sampler's weights.

    Raises:
        PapoError: the KL is beyond the bound; nothing has changed.
    """
    total = torch.zeros(len(fields(TokenSums)), dtype=torch.float64)
    branches = torch.zeros(BranchSums.size(), dtype=torch.float64)
    pieces = _in_pieces(sequences, micro_batch_size)
    probe: EntropyProbe | None = None
    if probe_tokens is not None:
        probe = EntropyProbe.of(
            engine, pieces, make_batch, micro_batch_size=micro_batch_size, tokens=probe_tokens
        )
    for i, piece in enumerate(pieces):
        batch = make_batch(piece)
        out = loss_of(engine, batch, params, weighting)
        engine.backward(out.loss, last=i == len(pieces) - 1)
        total += TokenSums.of(out, batch).cpu()
        branches += _branches(out, batch, controller).cpu()
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
    return Update(sums, over_ranks, result.grad_norm, reason, lr, probe)


def _in_pieces(
    sequences: Sequence[TrainingSequence], size: int
) -> list[Sequence[TrainingSequence]]:
    """Micro-batches, as many on every rank; a collective."""
    return list(micro_batches(sequences, size, count=pass_count(sequences, size)))


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
