"""The public functions: validate, flatten to rows, dispatch to the torch operations, reshape."""

from __future__ import annotations

import torch
from torch import Tensor

from . import loss_ops, ops
from .checks import check_float, check_row_options, check_targets, flat, loss_inputs
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
        temperature: > 0.
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
    check_float("logits", logits)
    columns = check_row_options(logits.shape[-1], temperature, softcap, vocab_size)
    check_targets("logits", logits, targets)
    *stats, _ = ops.run_token_stats(
        _rows(logits),
        flat(targets, targets.dtype),
        float(temperature),
        float(softcap or 0.0),
        columns,
        backend or "",
    )
    return TokenStats(*_shaped(stats, targets))


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
        inplace: overwrite the logits with their gradient instead of allocating it. The logits must
            not be a leaf or a view, and belong to this loss alone: another use in a loss, or a
            second backward, raises. Without a gradient to form (no_grad) they are left as they are.
            Under torch.compile, which places its buffers itself, it has no effect.

    Returns:
        PolicyLossOutput(loss, logp, entropy, unit_polarity, polarity, weight, ratio, clipped):
        `loss` is a differentiable scalar, the rest is detached and shaped like `targets`.

    Raises:
        TypeError, ValueError: as for `token_stats`.
    """
    check_float("logits", logits)
    columns = check_row_options(logits.shape[-1], temperature, softcap, vocab_size)
    check_targets("logits", logits, targets)
    call = loss_inputs(
        targets,
        TokenInputs(advantages, token_weight, old_logp, ref_logp),
        params,
        weighting,
        RowParams(temperature, softcap or 0.0, columns),
        acc_dtype(logits.dtype),
        backend,
        source="the logits",
    )
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if inplace and needs_grad and not torch.compiler.is_compiling():
        _check_overwritable(logits)
        loss, *parts = loss_ops.policy_loss_in_place(logits, call)
    else:
        loss, *parts = loss_ops.run_policy_loss(_rows(logits), call)
    return PolicyLossOutput(loss, *_shaped(parts, targets))


def _check_overwritable(logits: Tensor) -> None:
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


def _shaped(values: list[Tensor], like: Tensor) -> list[Tensor]:
    return values if like.dim() == 1 else [x.view(like.shape) for x in values]


def _rows(logits: Tensor) -> Tensor:
    """`logits` as `[N, V]` with unit column stride, a view where the layout allows."""
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
