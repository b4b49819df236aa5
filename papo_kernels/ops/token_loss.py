"""The policy loss of statistics, as a torch operation, and its autograd.

Losses that need more than a token's own row are composed of `token_stats`, which is differentiable,
and this step: a loss per token, the ratio of a sequence, log-probs in place of logits. So are
gradients in float16 that have yet to meet their loss scale: the row's gradient is then formed, and
rounded, when the upstream one is known.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from papo_kernels.dispatch import kernel_or_operation
from papo_kernels.token_loss import left_out, saturated, token_loss, weightless
from papo_kernels.types import IGNORE_INDEX, INSIDE, LossInputs

from .common import refuse_double_backward
from .schema import LOSS_SCHEMA, flattened, unflattened

# ---- sequences ----------------------------------------------------------------------------------


class _Segments(NamedTuple):
    """Which tokens make up a sequence, each `[N]`."""

    outside: Tensor  # bool: in none
    sequence: Tensor  # the token's, < N
    tokens: Tensor  # float64: how many this sequence has

    def mean(self, values: Tensor) -> Tensor:
        """Of the `values` of a token's sequence, float64; 0 for tokens that are in none."""
        inside = torch.where(self.outside, 0.0, values.double())
        sums = torch.zeros_like(inside).index_add(0, self.sequence, inside)
        return torch.where(self.outside, 0.0, (sums / self.tokens)[self.sequence])


def _segments(ids: Tensor, targets: Tensor) -> _Segments:
    outside = (ids < 0) | (targets == IGNORE_INDEX)
    ordered, order = torch.where(outside, -1, ids).sort()
    starts = torch.zeros_like(ordered)
    starts[1:] = ordered[1:] != ordered[:-1]
    sequence = torch.empty_like(order).scatter(0, order, starts.cumsum(0))
    ones = torch.ones(ids.shape, dtype=torch.float64, device=ids.device)
    return _Segments(outside, sequence, torch.zeros_like(ones).index_add(0, sequence, ones))


def _with_ratio_of(segments: _Segments, logp: Tensor, inputs: LossInputs) -> LossInputs:
    """`inputs` with the log of the sequences' ratios, the means of their tokens'."""
    tokens = inputs.tokens
    if tokens.old_logp is None:
        log_ratio = torch.zeros_like(logp, dtype=torch.float64)
    else:
        log_ratio = segments.mean(logp.double() - tokens.old_logp.double())
    return inputs._replace(tokens=tokens._replace(old_logp=None, log_ratio=log_ratio))


# ---- the operation ------------------------------------------------------------------------------


def _kernel(
    logp: Tensor, entropy: Tensor, unit_polarity: Tensor, inputs: LossInputs
) -> tuple[Tensor, ...]:
    """Each token's loss, polarity, weight, ratio and clip side; then the derivatives of its loss by
    logp, by the log of its ratio, and by its entropy, float64. All are 0 for a token that is
    ignored or has no weight."""
    targets, tokens, objective, weighting = inputs[:4]
    skipped = left_out(targets, tokens)
    stats = [torch.where(skipped, 0.0, x.double()) for x in (logp, entropy, unit_polarity)]
    terms = token_loss(stats[0], stats[1], stats[2], tokens, objective, weighting)
    # A row without a distribution is NaN in all that is made of it.
    spoiled = stats[0].isnan() | stats[1].isnan()
    loss, polarity, weight, ratio, side, *derivatives = (
        torch.where(skipped, 0, torch.where(spoiled, torch.nan, x) if x.is_floating_point() else x)
        for x in terms
    )
    side = torch.where(spoiled, INSIDE, side)
    outputs = [x.to(logp.dtype) for x in (loss, polarity, weight, ratio)]
    return *outputs, side, *derivatives


@custom_op(
    "papo::token_loss",
    mutates_args=(),
    schema=f"(Tensor logp, Tensor entropy, Tensor unit_polarity, {LOSS_SCHEMA}) -> (Tensor loss, "
    "Tensor polarity, Tensor weight, Tensor ratio, Tensor clip_side, Tensor dlogp, "
    "Tensor dlog_ratio, Tensor dentropy)",
)
def token_loss_operation(
    logp: Tensor, entropy: Tensor, unit_polarity: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    return _kernel(logp, entropy, unit_polarity, unflattened(arguments))


@token_loss_operation.register_fake
def _(logp: Tensor, *_: Any) -> tuple[Tensor, ...]:
    outputs = (torch.empty_like(logp) for _ in range(4))
    side = torch.empty_like(logp, dtype=torch.uint8)
    derivatives = (torch.empty_like(logp, dtype=torch.float64) for _ in range(3))
    return *outputs, side, *derivatives


def _operation(
    logp: Tensor, entropy: Tensor, unit_polarity: Tensor, inputs: LossInputs
) -> tuple[Tensor, ...]:
    return tuple(token_loss_operation(logp, entropy, unit_polarity, *flattened(inputs)))


# ---- autograd -----------------------------------------------------------------------------------


def _times(grad: Tensor, derivative: Tensor) -> Tensor:
    """Their product. An upstream 0 gives 0 whatever the other is, as in `scale_`, and a derivative
    of 0 however large the upstream one is."""
    zero = (grad == 0) | ((derivative == 0) & ~grad.isnan())
    return torch.where(zero, 0.0, grad * derivative)


class _TokenLoss(torch.autograd.Function):
    """Losses `[N]` whose derivatives were formed along with them.

    Args:
        losses: of each token.
        derivatives: what `_kernel` returns after the outputs.
        segments: of sequences whose ratio passes its gradient on to all of their tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        losses: Tensor,
        derivatives: tuple[Tensor, ...],
        segments: tuple[Tensor, ...] | None,
        logp: Tensor,
        entropy: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logp, entropy, *derivatives, *(segments or ()))
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if grad is None:
            return (None,) * 5
        logp, entropy, dlogp, dlog_ratio, dentropy, *segments = ctx.saved_tensors
        grad = grad.double()
        of_ratio = _times(grad, dlog_ratio)
        if segments:
            of_ratio = _Segments(*segments).mean(of_ratio)
        g_logp = saturated(_times(grad, dlogp) + of_ratio, logp.dtype).to(logp.dtype)
        g_entropy = None
        if entropy is not None:
            g_entropy = saturated(_times(grad, dentropy), entropy.dtype).to(entropy.dtype)
        return None, None, None, g_logp, g_entropy


def composed_targets(inputs: LossInputs) -> Tensor:
    """The targets, and -100 where the statistics of a token are not needed: it has no weight and
    belongs to no sequence."""
    unread = weightless(inputs.tokens)
    if inputs.sequences is not None:
        unread &= inputs.sequences < 0
    return torch.where(unread, IGNORE_INDEX, inputs.targets)


def run_token_loss(
    logp: Tensor, entropy: Tensor | None, unit_polarity: Tensor | None, inputs: LossInputs
) -> tuple[Tensor, ...]:
    """The fields of `PolicyLossOutput` from statistics `[N]`. Where one is None, what is made of it
    is NaN; no term of the loss may need it."""
    known = logp.detach()
    stats = [torch.zeros_like(known) if x is None else x.detach() for x in (entropy, unit_polarity)]
    segments, level = None, inputs.objective.ratio_level
    if inputs.sequences is not None:
        segments = _segments(inputs.sequences, inputs.targets)
        inputs = _with_ratio_of(segments, known, inputs)
    run = kernel_or_operation((known,), _kernel, _operation)
    losses, *outputs, dlogp, dlog_ratio, dentropy = run(known, *stats, inputs)
    if segments is not None:
        # The ratio of a token in no sequence is constant.
        dlog_ratio = torch.where(segments.outside, 0.0, dlog_ratio)
    inputs_of_loss = [x for x in (logp, entropy) if x is not None and x.requires_grad]
    if inputs_of_loss and torch.is_grad_enabled():
        shared = segments if level == "sequence" else None
        losses = _TokenLoss.apply(losses, (dlogp, dlog_ratio, dentropy), shared, logp, entropy)
    skipped = left_out(inputs.targets, inputs.tokens)
    reported = [torch.where(skipped, 0.0, x) for x in (known, *stats)]
    unknown = torch.full_like(known, torch.nan)
    if entropy is None:
        reported[1] = unknown
    if unit_polarity is None:
        reported[2], outputs[0] = unknown, unknown
    loss = losses.sum() if inputs.objective.reduce else losses
    return loss, *reported, *outputs
