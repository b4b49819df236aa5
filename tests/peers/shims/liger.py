"""Liger's fused GRPO losses on papo_kernels.

`chunked_loss` is `LigerFusedLinearGRPOLoss`, a loss of hidden states; `triton_loss` is
`triton_grpo_loss`, one of logits that gives each token's. Both are `grpo_loss` with the weights of
their aggregation.
"""

from __future__ import annotations

import inspect
import math
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction, get_gamma_weights
from liger_kernel.transformers.grpo_loss import (
    _masked_mean,
    _reduce_grpo_loss,
    triton_grpo_loss,
)
from torch import Tensor

from papo_kernels import (
    Head,
    LogRatio,
    Objective,
    PolicyLossOutput,
    Sequences,
    TokenWeights,
    policy_loss,
    token_stats,
)
from papo_kernels.types import CLIPPED_HIGH, CLIPPED_LOW

_CHUNKED = inspect.signature(LigerFusedLinearGRPOFunction.forward)
_TRITON = inspect.signature(triton_grpo_loss)


def _options(signature: inspect.Signature, *args: Any, **kwargs: Any) -> SimpleNamespace:
    """The arguments of a call of Liger's, by name."""
    call = signature.bind(*args, **kwargs)
    call.apply_defaults()
    return SimpleNamespace(**call.arguments)


def objective_of(o: SimpleNamespace, reduce: bool) -> Objective:
    """What Liger's options are called here."""
    if o.importance_sampling_level == "sequence" and o.loss_type in ("cispo", "sapo", "vespo"):
        raise ValueError(
            f"Sequence-level importance sampling is not supported for loss_type {o.loss_type!r}"
        )
    surrogate: dict[str, Any] = {
        # `grpo_loss` gives cispo the ratio to its upper bound, so that it is bounded by 1.
        "cispo": dict(surrogate="cispo", clip_low=math.inf, clip_high=0.0),
        "vespo": dict(surrogate="cispo", clip_low=0.0, clip_high=0.0),
        "sapo": dict(
            surrogate="sapo", sapo_temperature=(o.sapo_temperature_pos, o.sapo_temperature_neg)
        ),
    }.get(o.loss_type, dict(clip_low=o.epsilon_low, clip_high=o.epsilon_high, dual_clip=o.delta))
    return Objective(
        **surrogate,
        ratio_level=o.importance_sampling_level,
        kl_coef=o.beta if o.ref_logp is not None else 0.0,
        kl_ratio=o.use_bias_correction_kl,
        reduce=reduce,
    )


def grpo_loss(
    logits: Any, ids: Tensor, o: SimpleNamespace, weights: TokenWeights, reduce: bool
) -> tuple[PolicyLossOutput, Tensor, Tensor]:
    """The loss, and each token's KL to the reference and whether its ratio was clipped, `[B, T]`.

    `logits`: as `policy_loss` takes them. `weights`: of the terms, the sampler's weight aside.
    """
    advantages, old, bound = o.advantages, o.old_logp, 1.0
    temperature = float(o.temperature)
    sampler = o.vllm_is_ratio
    if sampler is not None and sampler.dim() == 1:
        sampler = sampler[:, None]
    if o.loss_type == "vespo":
        with torch.no_grad():
            logp = token_stats(logits, ids, temperature=temperature).logp
        log_ratio = torch.zeros_like(logp) if old is None else logp - old
        shape = (o.vespo_k_pos, o.vespo_lambda_pos, o.vespo_k_neg, o.vespo_lambda_neg)
        phi = get_gamma_weights(advantages, log_ratio, o.mask, sampler, *shape)
        advantages = advantages * phi[:, 0]
    elif sampler is not None:
        weights = weights._replace(policy=weights.policy * sampler)
    if o.loss_type == "cispo":
        # min(r, bound) = bound min(r / bound, 1)
        bound = o.epsilon_high
        on_policy = LogRatio(torch.full(ids.shape, -math.log(bound), device=ids.device))
        old = on_policy if old is None else old + math.log(bound)
        advantages = advantages * bound
        if o.use_bias_correction_kl:
            weights = weights._replace(kl=weights.kl * bound)
    if o.importance_sampling_level == "sequence":
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        old = Sequences(old, torch.where(o.mask > 0, rows, -1))
    out = policy_loss(
        logits,
        ids,
        advantages,
        weights,
        old_logp=old,
        ref_logp=o.ref_logp,
        objective=objective_of(o, reduce),
        temperature=temperature,
    )
    kl = torch.zeros_like(out.logp)
    if o.ref_logp is not None:
        x = o.ref_logp - out.logp
        kl = (x.expm1() - x) * (out.ratio * bound if o.use_bias_correction_kl else 1.0)
    over = (out.clip_side == CLIPPED_HIGH) & (o.advantages > 0)[:, None]
    clipped = over | (out.clip_side == CLIPPED_LOW)
    return out, kl, clipped & (o.loss_type != "vespo")


def weights_of(o: SimpleNamespace) -> TokenWeights:
    """Of `o.loss_type`'s aggregation: one number for all tokens but for the kinds of mean."""
    mask, (sequences, length) = o.mask, o.mask.shape
    tokens = mask.sum(-1, keepdim=True)
    if o.loss_type in ("grpo", "sapo"):
        policy = mask / tokens.clamp(min=1.0) / sequences
    elif o.loss_type == "bnpo":
        policy = mask / mask.sum().clamp(min=1.0)
    elif o.loss_type == "dr_grpo":
        policy = mask / (sequences * o.max_completion_length)
    elif o.loss_type == "luspo":
        # A sequence's loss times its length; the KL term's mean counts masked tokens as well.
        return TokenWeights(mask / sequences, tokens.expand_as(mask) / (sequences * length))
    else:
        policy = mask / LigerFusedLinearPPOBase._compute_dapo_normalizer(mask, o.num_items_in_batch)
    return TokenWeights(policy, policy)


def chunked_loss(*args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`LigerFusedLinearGRPOFunction.apply`."""
    o = _options(_CHUNKED, None, *args, **kwargs)
    ids, o.mask, o.old_logp = o.selected_token_ids, o.attention_mask.float(), o.old_per_token_logps
    o.ref_logp = o.ref_per_token_logps if o.use_ref_model and o.beta != 0.0 else None
    if o.ref_per_token_logps is not None and o.ref_input is not None:
        warnings.warn("Both are given. Using ref_per_token_logps.", stacklevel=1)
    elif o.use_ref_model and o.ref_input is not None and o.beta != 0.0:
        reference = Head(o.ref_weight, o.ref_bias)(o.ref_input)
        with torch.no_grad():
            o.ref_logp = token_stats(reference, ids, temperature=float(o.temperature)).logp
    logits = Head(o.weight, o.bias)(o._input)
    out, kl, clipped = grpo_loss(logits, ids, o, weights_of(o), reduce=True)
    metrics = [_masked_mean(kl, o.mask)] if o.beta != 0.0 else []
    return out.loss, (*metrics, _masked_mean(clipped, o.mask))


def triton_loss(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """`triton_grpo_loss`."""
    o = _options(_TRITON, *args, **kwargs)
    ids, o.epsilon_low, o.epsilon_high = o.completion_ids, o.eps_low, o.eps_high
    o.mask = torch.ones_like(ids) if o.completion_mask is None else o.completion_mask
    o.ref_logp = o.ref_logp if o.beta != 0.0 else None
    weights = TokenWeights(o.mask.float(), o.mask.float())
    out, kl, clipped = grpo_loss(o.logits[:, :-1], ids, o, weights, reduce=False)
    if not o.reduce:
        return out.loss, kl * o.mask if o.beta != 0.0 else None, clipped.float()
    loss = _reduce_grpo_loss(
        out.loss, o.mask, o.loss_type, o.max_completion_length, o.num_items_in_batch
    )
    metrics = [_masked_mean(kl, o.mask)] if o.beta != 0.0 else []
    return loss, [*metrics, _masked_mean(clipped, o.mask)]


def chunk_forward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`LigerFusedLinearPPOBase.chunk_forward`."""
    return token_stats(Head(weight, bias)(hidden), ids, temperature=temperature).logp


def selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """`fused_selective_log_softmax`, which has no gradient; `input_ids` begin with the prompt's."""
    ids = input_ids[:, 1 - logits.shape[1] :]
    if mask is not None:
        ids = ids.masked_fill(mask[:, -ids.shape[1] :] == 0, -100)
    with torch.no_grad():
        return token_stats(logits[:, :-1], ids, temperature=temperature).logp


MODULES = ("liger_kernel",)
FUNCTIONS = {
    "triton_grpo_loss": triton_loss,
    "liger_fused_linear_grpo": chunked_loss,
    "fused_selective_log_softmax": selective_log_softmax,
}
METHODS = {
    "LigerFusedLinearGRPOFunction.apply": chunked_loss,
    "LigerFusedLinearPPOBase.chunk_forward": chunk_forward,
}
