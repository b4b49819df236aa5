"""The public functions: check, flatten to rows, call the operation, reshape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .checks import check_type
from .dispatch import refuse_forward_mode
from .head.checks import loss_inputs, prepare
from .head.head import LazyLogits
from .head.passes import Operands
from .head.shards import agree
from .inputs import (
    LossArguments,
    checked_objective,
    flat_ids,
    held_logits,
    log_probs,
    shaped,
    targets_of_rows,
)
from .objective import Objective, PolarityWeighting
from .ops.head import HeadCall, run_head_policy_loss, run_head_token_stats
from .ops.in_place import run_policy_loss_in_place
from .ops.policy_loss import run_policy_loss
from .ops.token_loss import composed_targets, run_token_loss
from .ops.token_stats import full_stats, run_logit_sums, run_token_stats
from .types import (
    Compute,
    FullTokenStats,
    Logits,
    LogProbs,
    LogRatio,
    LossInputs,
    PolicyLossOutput,
    RowParams,
    Sequences,
    TokenStats,
    TokenWeights,
    acc_dtype,
)

_DEFAULT_COMPUTE = Compute()


def token_stats(
    logits: Tensor | Logits | LazyLogits,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    compute: Compute | None = None,
) -> TokenStats | FullTokenStats:
    """Log-probability, entropy and entropy polarity of sampled tokens, in one pass over the logits.

    With u = softcap(logits) / temperature, p = softmax(u) and sampled token a: logp = log p_a,
    entropy = H = -sum_v p_v log p_v, and the unit polarity c = sum_v p_v^2 (log p_v + H) -
    p_a (log p_a + H), the first-order change of H per unit of advantage and step when a is
    reinforced (arXiv 2605.11775). All in nats. All four are differentiable, once: in the logits, or
    in the hidden states, the head's weight, bias and LoRA factors.

    For ``head(hidden)``, backward computes the logits of each chunk again. Beyond its results it
    needs the workspace. A half-precision weight whose tokens need several slabs also needs the
    memory of its gradient a second time.

    Args:
        logits: a tensor ``[..., V]``; or `Logits`, a tensor with a soft cap or padded columns; or
            ``head(hidden)``, the logits of a `Head`, which are never held whole.
        targets: ``[...]`` int64, the sampled tokens; -100: ignored, all outputs and the gradient 0.
            A GPU computes the logits of a head's ignored rows all the same: to leave them out it
            would have to wait for their number. With as many dimensions as the logits have,
            ``[..., k]``: k ids a row, of which -100 leaves out one.
        temperature: in [1e-18, 1e18]; or each row's own, a tensor like `targets` (of k ids a row,
            like their leading dimensions). A compiled graph serves every value.
        compute: backend and memory; None for `Compute()`.

    Returns:
        TokenStats(logp, entropy, unit_polarity, lse), each shaped like `targets`; float32, or
        float64 for float64 logits. A row with NaN, +inf or nothing but -inf gives NaN. A sampled
        token that is masked has logp -inf and its row's gradient is 0. Of k ids a row logp and
        unit_polarity are ``[..., k]``, and a masked one adds nothing to the gradient, which is 0
        where all of a row's ids are masked. With compute.full_stats: a `FullTokenStats`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected; among them a
            weight of zero elements, which is what ZeRO-3 leaves outside a gather. A target or a
            row's temperature out of range raises for CPU tensors; on a GPU, and a temperature in
            compiled code, it makes its row NaN.
        NotImplementedError: under forward-mode differentiation.
    """
    if compute is None:
        compute = _DEFAULT_COMPUTE
    check_type("compute", compute, Compute)
    rows, full = targets_of_rows(logits, targets), compute.full_stats
    if isinstance(logits, LazyLogits):
        operands, call, _ = _head_call(logits, rows, temperature, compute, None)
        refuse_forward_mode(operands, call.options.row)
        row, flat_targets = call.options.row, flat_ids(targets, rows)
        stats = run_head_token_stats(operands, call, flat_targets, full)
    else:
        values, row = held_logits(logits, rows, temperature)
        refuse_forward_mode((values, row.temperatures))
        flat_targets = flat_ids(targets, rows)
        stats = run_token_stats(values, flat_targets, row, compute.backend or "", full)
        if full:
            stats = *stats, run_logit_sums(values, row)
    if full:
        stats = full_stats(stats, flat_targets, row.vocab_size)
    fields = shaped(stats, targets, rows)
    return FullTokenStats(*fields) if full else TokenStats(*fields)


def policy_loss(
    logits: Tensor | Logits | LazyLogits | LogProbs | TokenStats | FullTokenStats,
    targets: Tensor,
    advantages: Tensor,
    token_weight: Tensor | TokenWeights,
    *,
    old_logp: Tensor | LogRatio | Sequences | None = None,
    ref_logp: Tensor | None = None,
    objective: Objective | None = None,
    weighting: PolarityWeighting | None = None,
    temperature: float | Tensor = 1.0,
    compute: Compute | None = None,
) -> PolicyLossOutput:
    """The policy-gradient loss with polarity weighting, fused with its gradient.

    For a token with log-ratio x = logp - old_logp and advantage A, r = exp(x) and A' = w A:

        L = policy_weight surrogate(r, A') + kl_weight kl_coef K - entropy_weight entropy_coef H
        loss = sum over tokens of L

    `Objective` has the surrogates and the estimates K of the KL. With the surrogate "clip" the
    first term is -min(r A', clip(r, 1 - clip_low, 1 + clip_high) A'). The weight w =
    scale (1 + strength phase h(polarity / sigma)) with polarity = r A c carries no gradient;
    without `weighting`, w = 1.

    Where a gradient is asked for, it is formed in the forward pass and multiplied by the upstream
    scalar in backward (free where that is 1). For ``head(hidden)`` it is formed chunk by chunk, in
    three matrix products, none of which is repeated. The head's weight is read in the forward pass
    only, so under ZeRO-3 it need not be gathered for backward.

    An objective.ratio_level of sequences, objective.reduce False, and float16 without
    compute.grad_scale need more than a token's own row. They are `token_stats` and a step over its
    results: backward forms the gradient from the upstream one, and a head computes its logits
    again, for which its weight has to be there. ``compute.inplace`` has no effect on them.

    Each input that is per token is like `targets`, ``[B, T]``, or broadcasts to it: 0-dim,
    ``[B]``, ``[B, 1]`` or ``[1, T]``.

    Args:
        logits, targets, compute: as for `token_stats`, one id a row. In place of logits also
            `LogProbs` or `TokenStats`, in which the loss is then differentiable.
        advantages: per token, any real dtype.
        token_weight: per token, the loss mask times the normalizer of the aggregation, such as
            `normalized_mask` gives; or `TokenWeights`, each term's own. A token of weight 0 in
            every term contributes exactly nothing, whatever its logits or hidden state hold, and
            all its outputs are 0.
        old_logp: per token, logp under the policy that sampled; `LogRatio`, the log of the ratio
            itself; or `Sequences`, with the ids of the tokens' sequences. None: on-policy, r = 1
            with the gradient of exp(logp - stop_gradient(logp)). -inf makes r infinite; where logp
            is -inf too, the loss is NaN.
        ref_logp: per token, logp under the reference policy; needed where objective.kl_coef is
            not 0.
        objective: the surrogate and the other terms; None for `Objective()`.
        weighting: polarity weighting, None for none.
        temperature: as for `token_stats`; 1 with log-probs, which have one already.

    Returns:
        PolicyLossOutput(loss, logp, entropy, unit_polarity, polarity, weight, ratio, clip_side):
        `loss` is a differentiable scalar, or with objective.reduce False like `targets`; the rest
        is detached and shaped like `targets`. What needs a field that `LogProbs` does not have is
        NaN.

    Raises:
        TypeError, ValueError: as for `token_stats`.
        NotImplementedError: under forward-mode differentiation.
    """
    if compute is None:
        compute = _DEFAULT_COMPUTE
    check_type("compute", compute, Compute)
    objective = checked_objective(objective)
    arguments = LossArguments(
        targets, advantages, token_weight, old_logp, ref_logp, objective, weighting
    )
    if isinstance(logits, LazyLogits):
        fields = _of_head(logits, arguments, temperature, compute)
    elif isinstance(logits, (LogProbs, TokenStats, FullTokenStats)):
        fields = _of_log_probs(logits, arguments, temperature)
    else:
        fields = _of_held_logits(logits, arguments, temperature, compute)
    if objective.reduce:
        return PolicyLossOutput(fields[0], *shaped(fields[1:], targets))
    return PolicyLossOutput(*shaped(fields, targets))


def _of_held_logits(
    logits: Tensor | Logits,
    arguments: LossArguments,
    temperature: float | Tensor,
    compute: Compute,
) -> tuple[Tensor, ...]:
    values, row = held_logits(logits, arguments.targets, temperature)
    backend = compute.backend or ""
    inputs = arguments.checked(row, acc_dtype(values.dtype), backend, "the logits")
    refuse_forward_mode((values,), inputs)
    half = values.dtype is torch.float16 and torch.is_grad_enabled() and values.requires_grad
    if _is_composed(inputs.objective, half, compute.grad_scale):
        stats = run_token_stats(values, composed_targets(inputs), row, backend)
        logp, entropy, unit_polarity, _ = stats
        return run_token_loss(logp, entropy, unit_polarity, inputs)
    run = run_policy_loss_in_place if compute.inplace else run_policy_loss
    if half and compute.grad_scale is not None:
        return _scaled(partial(run, values), inputs, compute.grad_scale)
    return run(values, inputs)


def _of_head(
    logits: LazyLogits,
    arguments: LossArguments,
    temperature: float | Tensor,
    compute: Compute,
) -> tuple[Tensor, ...]:
    operands, call, inputs = _head_call(logits, arguments.targets, temperature, compute, arguments)
    assert inputs is not None
    refuse_forward_mode(operands, inputs)
    half = operands.hidden.dtype is torch.float16 and any(operands.needs())
    if _is_composed(inputs.objective, half, compute.grad_scale):
        stats = run_head_token_stats(operands, call, composed_targets(inputs))
        logp, entropy, unit_polarity, _ = stats
        return run_token_loss(logp, entropy, unit_polarity, inputs)
    if half and compute.grad_scale is not None:
        run = partial(run_head_policy_loss, operands, call)
        return _scaled(run, inputs, compute.grad_scale)
    return run_head_policy_loss(operands, call, inputs)


def _is_composed(objective: Objective, half: bool, grad_scale: float | None) -> bool:
    """Whether the loss needs more than a token's own row, so that it is composed of statistics.

    Args:
        half: the loss has a float16 gradient. Whatever scales the loss must act before that is
            rounded.
    """
    by_token = objective.reduce and objective.ratio_level == "token"
    return not by_token or (half and grad_scale is None)


def _scaled(
    run: Callable[[LossInputs], tuple[Tensor, ...]], inputs: LossInputs, factor: float
) -> tuple[Tensor, ...]:
    """What `run` returns, with a gradient that it forms times `factor`."""
    loss, *parts = run(inputs._replace(tokens=inputs.tokens.weighted(factor)))
    return loss / factor, *parts


def _of_log_probs(
    given: LogProbs | TokenStats | FullTokenStats,
    arguments: LossArguments,
    temperature: float | Tensor,
) -> tuple[Tensor, ...]:
    logp, *others = log_probs(
        given, arguments.targets, temperature, arguments.objective, arguments.weighting
    )
    # There are no rows, and nothing reads their parameters.
    inputs = arguments.checked(RowParams(1.0, 0.0, 1), logp.dtype, "", "the log-probs")
    refuse_forward_mode((logp, *others), inputs)
    entropy, unit_polarity = (None if x is None else x.reshape(-1) for x in others)
    return run_token_loss(logp.reshape(-1), entropy, unit_polarity, inputs)


def _head_call(
    logits: LazyLogits,
    targets: Tensor,
    temperature: float | Tensor,
    compute: Compute,
    loss: LossArguments | None,
) -> tuple[Operands, HeadCall, LossInputs | None]:
    """The checked call of a head, on one rank or on several."""
    if logits.head.group is None:
        operands, options = prepare(logits, targets, temperature, compute)
        return operands, HeadCall(options, None), loss_inputs(loss, options)
    operands, options, inputs, split = agree(logits, targets, temperature, compute, loss)
    return operands, HeadCall(options, split), inputs
