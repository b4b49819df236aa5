"""The public functions: check, flatten to rows, call the operation, reshape."""

from __future__ import annotations

from torch import Tensor

from .checks import check_type
from .head.checks import loss_inputs, prepare
from .head.head import LazyLogits
from .head.passes import Operands
from .head.shards import agree
from .inputs import LossArguments, flat_ids, held_logits, shaped, targets_of_rows
from .objective import Objective, PolarityWeighting
from .ops.head import HeadCall, run_head_policy_loss, run_head_token_stats
from .ops.in_place import run_policy_loss_in_place
from .ops.policy_loss import run_policy_loss
from .ops.token_stats import full_stats, run_logit_sums, run_token_stats
from .types import (
    Compute,
    FullTokenStats,
    Logits,
    LossInputs,
    PolicyLossOutput,
    TokenInputs,
    TokenStats,
    acc_dtype,
)

_DEFAULT_COMPUTE = Compute()


def token_stats(
    logits: Tensor | Logits | LazyLogits,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    compute: Compute | None = None,
) -> TokenStats | FullTokenStats:
    """Log-probability, entropy and entropy polarity of sampled tokens, in one pass over the logits.

    With u = softcap(logits) / temperature, p = softmax(u) and sampled token a: logp = log p_a,
    entropy = H = -sum_v p_v log p_v, and the unit polarity c = sum_v p_v^2 (log p_v + H) -
    p_a (log p_a + H), the first-order change of H per unit of advantage and step when a is
    reinforced (arXiv 2605.11775). All in nats. logp, entropy and unit_polarity are differentiable,
    once: in the logits, or in the hidden states, the head's weight, bias and LoRA factors. Using
    lse in a loss raises in backward.

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
        temperature: in [1e-18, 1e18]. A compiled graph holds it as a constant: another value compiles it again.
        compute: backend and memory; None for `Compute()`.

    Returns:
        TokenStats(logp, entropy, unit_polarity, lse), each shaped like `targets`; float32, or
        float64 for float64 logits. A row with NaN, +inf or nothing but -inf gives NaN. A sampled
        token that is masked has logp -inf and its row's gradient is 0. Of k ids a row logp and
        unit_polarity are ``[..., k]``, and a masked one adds nothing to the gradient, which is 0
        where all of a row's ids are masked. With compute.full_stats: a `FullTokenStats`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected; among them a
            weight of zero elements, which is what ZeRO-3 leaves outside a gather. A target out of
            range raises for CPU tensors; on a GPU it makes its row NaN.
    """
    if compute is None:
        compute = _DEFAULT_COMPUTE
    check_type("compute", compute, Compute)
    rows, full = targets_of_rows(logits, targets), compute.full_stats
    if isinstance(logits, LazyLogits):
        operands, call, _ = _head_call(logits, rows, temperature, compute, None)
        row, flat_targets = call.options.row, flat_ids(targets, rows)
        stats = run_head_token_stats(operands, call, flat_targets, full)
    else:
        values, row = held_logits(logits, rows, temperature)
        flat_targets = flat_ids(targets, rows)
        stats = run_token_stats(values, flat_targets, row, compute.backend or "", full)
        if full:
            stats = *stats, run_logit_sums(values, row)
    if full:
        stats = full_stats(stats, flat_targets, row.vocab_size)
    fields = shaped(stats, targets, rows)
    return FullTokenStats(*fields) if full else TokenStats(*fields)


def policy_loss(
    logits: Tensor | Logits | LazyLogits,
    targets: Tensor,
    advantages: Tensor,
    token_weight: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    objective: Objective | None = None,
    weighting: PolarityWeighting | None = None,
    temperature: float = 1.0,
    compute: Compute | None = None,
) -> PolicyLossOutput:
    """The clipped policy-gradient loss with polarity weighting, fused with its gradient.

    For a token with advantage A: r = exp(logp - old_logp), A' = w A, and

        L = -min(r A', clip(r, 1 - clip_low, 1 + clip_high) A')    (where A' < 0: <= -dual_clip A')
          + kl_coef (exp(ref_logp - logp) - (ref_logp - logp) - 1) - entropy_coef H
        loss = sum over tokens of token_weight L

    w = scale (1 + strength phase h(polarity / sigma)) with polarity = r A c carries no gradient;
    without `weighting`, w = 1.

    Where a gradient is asked for, it is formed in the forward pass and multiplied by the upstream
    scalar in backward (free where that is 1). For ``head(hidden)`` it is formed chunk by chunk, in
    three matrix products, none of which is repeated. The head's weight is read in the forward pass
    only, so under ZeRO-3 it need not be gathered for backward.

    Args:
        logits, targets, temperature, compute: as for `token_stats`. With half-precision hidden
            states the gradient of a head's logits is half precision too: for float16 a loss scale
            belongs in `token_weight`, where it keeps small gradients from vanishing.
        advantages: like `targets`, any real dtype.
        token_weight: like `targets`: the loss mask times the normalizer of the aggregation, e.g.
            mask / mask.sum() for a token mean. A token of weight 0 contributes exactly nothing,
            whatever its logits or hidden state hold, and all its outputs are 0.
        old_logp: logp under the policy that sampled, like `targets`; None: on-policy, r = 1 with
            the gradient of exp(logp - stop_gradient(logp)).
        ref_logp: logp under the reference policy; needed where objective.kl_coef is not 0.
        objective: the surrogate's options; None for `Objective()`.
        weighting: polarity weighting, None for none.

    Returns:
        PolicyLossOutput(loss, logp, entropy, unit_polarity, polarity, weight, ratio, clip_side):
        `loss` is a differentiable scalar, the rest is detached and shaped like `targets`.

    Raises:
        TypeError, ValueError: as for `token_stats`.
    """
    if compute is None:
        compute = _DEFAULT_COMPUTE
    tokens = TokenInputs(advantages, token_weight, old_logp, ref_logp)
    arguments = LossArguments(targets, tokens, objective, weighting)
    if isinstance(logits, LazyLogits):
        operands, call, inputs = _head_call(logits, targets, temperature, compute, arguments)
        assert inputs is not None
        loss, *parts = run_head_policy_loss(operands, call, inputs)
    else:
        check_type("compute", compute, Compute)
        values, row = held_logits(logits, targets, temperature)
        dtype = acc_dtype(values.dtype)
        inputs = arguments.checked(row, dtype, compute.backend or "", "the logits")
        run = run_policy_loss_in_place if compute.inplace else run_policy_loss
        loss, *parts = run(values, inputs)
    return PolicyLossOutput(loss, *shaped(parts, targets))


def _head_call(
    logits: LazyLogits,
    targets: Tensor,
    temperature: float,
    compute: Compute,
    loss: LossArguments | None,
) -> tuple[Operands, HeadCall, LossInputs | None]:
    """The checked call of a head, on one rank or on several."""
    if logits.head.group is None:
        operands, options = prepare(logits, targets, temperature, compute)
        return operands, HeadCall(options, None), loss_inputs(loss, options)
    operands, options, inputs, split = agree(logits, targets, temperature, compute, loss)
    return operands, HeadCall(options, split), inputs
