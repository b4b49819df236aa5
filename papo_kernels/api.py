"""The public functions: validate, flatten to rows, dispatch to the torch operations, reshape."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_float, check_row_options, check_targets, flat, loss_inputs, shaped
from .ops import policy_loss as loss_ops
from .ops import token_stats as ops
from .types import (
    PolarityWeighting,
    PolicyLossOutput,
    PolicyLossParams,
    RowParams,
    TokenInputs,
    TokenStats,
    acc_dtype,
)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Log-probability, entropy and entropy polarity of sampled tokens, in one pass over the logits.

    With u = softcap(logits) / temperature, p = softmax(u) and sampled token a: logp = log p_a,
    entropy = H = -sum_v p_v log p_v, and the unit polarity c = sum_v p_v^2 (log p_v + H) -
    p_a (log p_a + H), the first-order change of H per unit of advantage and step when a is
    reinforced (arXiv 2605.11775). All in nats. logp, entropy and unit_polarity are differentiable
    in the logits, once; using lse in a loss raises in backward.

    Args:
        logits: ``[..., V]`` float16, bfloat16, float32, or float64 (reference and cpu backends).
            -inf masks a token: p = 0, gradient 0. Read without a copy where the leading dimensions
            flatten to one stride and the last has stride 1.
        targets: ``[...]`` int64, the sampled tokens; -100: ignored, all outputs and the gradient 0.
        temperature: > 0. A compiled graph holds it as a constant: another value compiles it again.
        softcap: u = softcap * tanh(z / softcap) / temperature; > 0, None for none.
        vocab_size: columns from there on are padding: never read, p = 0, gradient 0.
        backend: "reference", "cpu", "triton" or "cuda"; by default ``PAPO_BACKEND`` or else the
            fastest that serves the logits.

    Returns:
        TokenStats(logp, entropy, unit_polarity, lse), each shaped like `targets`; float32, or
        float64 for float64 logits. A row with NaN, +inf or nothing but -inf gives NaN. A sampled
        token that is masked has logp -inf and its row's gradient is 0.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected. A target out
            of range raises for CPU tensors; on a GPU it makes its row NaN.
    """
    row = _checked_row(logits, targets, temperature, softcap, vocab_size)
    stats = ops.run_token_stats(logits, flat(targets, torch.int64), row, backend or "")
    return TokenStats(*shaped(stats, targets))


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    token_weight: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    params: PolicyLossParams | None = None,
    weighting: PolarityWeighting | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> PolicyLossOutput:
    """The clipped policy-gradient loss with polarity weighting, fused with its gradient.

    For a token with advantage A: r = exp(logp - old_logp), A' = w A, and

        L = -min(r A', clip(r, 1 - clip_low, 1 + clip_high) A')    (where A' < 0: <= -dual_clip A')
          + kl_coef (exp(ref_logp - logp) - (ref_logp - logp) - 1) - entropy_coef H
        loss = sum over tokens of token_weight L

    w = scale (1 + strength phase h(polarity / sigma)) with polarity = r A c carries no gradient;
    without `weighting`, w = 1. The gradient is formed in the forward pass, where logits require it.

    Args:
        logits, targets, temperature, softcap, vocab_size, backend: as for `token_stats`.
        advantages: like `targets`, any real dtype.
        token_weight: like `targets`: the loss mask times the normaliser of the aggregation, e.g.
            mask / mask.sum() for a token mean. A token of weight 0 contributes exactly nothing,
            whatever its logits hold, and all its outputs are 0.
        old_logp: logp under the policy that sampled, like `targets`; None: on-policy, r = 1 with
            the gradient of exp(logp - stop_gradient(logp)).
        ref_logp: logp under the reference policy; needed where params.kl_coef is not 0.
        params: the surrogate's options; None for `PolicyLossParams()`.
        weighting: polarity weighting, None for none.
        inplace: overwrite the logits with their gradient instead of allocating it. They must not be
            a leaf or a view, and belong to this loss alone: another use in a loss, or a second
            backward, raises. No effect under no_grad, nor under torch.compile, which places its
            buffers itself.

    Returns:
        PolicyLossOutput(loss, logp, entropy, unit_polarity, polarity, weight, ratio, clipped):
        `loss` is a differentiable scalar, the rest is detached and shaped like `targets`.

    Raises:
        TypeError, ValueError: as for `token_stats`.
    """
    row = _checked_row(logits, targets, temperature, softcap, vocab_size)
    tokens = TokenInputs(advantages, token_weight, old_logp, ref_logp)
    call = loss_inputs(
        targets, tokens, params, weighting, row, acc_dtype(logits.dtype), backend, "the logits"
    )
    in_place = inplace and _overwritable(logits)
    run = loss_ops.policy_loss_in_place if in_place else loss_ops.run_policy_loss
    loss, *parts = run(logits, call)
    return PolicyLossOutput(loss, *shaped(parts, targets))


def _checked_row(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    vocab_size: int | None,
) -> RowParams:
    check_float("logits", logits)
    columns = check_row_options(logits.shape[-1], temperature, softcap, vocab_size)
    check_targets("logits", logits, targets)
    return RowParams(float(temperature), float(softcap or 0.0), columns)


def _overwritable(logits: Tensor) -> bool:
    """Whether there is a gradient to put in place of the logits; raises where that is not safe."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        return False
    if logits.is_leaf:
        raise ValueError(
            "inplace: expected False for logits that are a leaf requiring grad: "
            "autograd would lose their value"
        )
    if logits._is_view():
        raise ValueError(
            "inplace: expected False for logits that are a view of another tensor; or pass that "
            "tensor itself, any leading shape is accepted"
        )
    if not logits.is_contiguous():
        raise ValueError(
            f"inplace: expected False for logits that are not contiguous, got strides "
            f"{logits.stride()} for shape {tuple(logits.shape)}"
        )
    return True
