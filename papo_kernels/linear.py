"""From hidden states and the head's weight to statistics and loss, without the logits tensor.

Logits exist a chunk of tokens at a time, in one workspace that does not grow with N or V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import flat, shaped
from .head.checks import ChunkArguments, HeadArguments, RowArguments, prepare, prepare_loss
from .head.keep import KeepSet
from .ops.linear import run_linear_policy_loss, run_linear_token_stats
from .types import (
    LoRAHead,
    PolarityWeighting,
    PolicyLossOutput,
    PolicyLossParams,
    TokenInputs,
    TokenStats,
)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    keep: KeepSet | None = None,
    lora: LoRAHead | None = None,
    logits_dtype: torch.dtype | None = None,
) -> TokenStats:
    """`token_stats` of the logits logit_scale (hidden W^T + bias), which are never held whole.

    Differentiable in hidden, weight, bias and the factors of `lora`, once; backward computes the
    logits of each chunk again. Beyond results it takes the workspace and, for a half-precision
    weight whose tokens need several slabs, the memory of its gradient once more.

    Args:
        hidden: ``[..., D]`` float16, bfloat16, float32, or float64 (reference and cpu backends).
        weight: ``[V, D]`` like `hidden`. Under ``torch.autocast`` both are cast as ``F.linear``
            casts them. The gradient of one that does not require it costs nothing.
        targets: ``[...]`` int64, the sampled tokens; -100: ignored. Only a GPU multiplies ignored
            rows, so as not to wait for their number.
        bias: ``[V]`` like `weight`; -inf masks a token.
        temperature: > 0.
        softcap: u = softcap * tanh(z / softcap) / temperature; > 0, None for none.
        logit_scale: a factor on the logits before the soft cap (Cohere; Granite's divisor is its
            inverse); > 0.
        vocab_size: rows of `weight` from there on are padding: never read, p = 0, gradient 0.
        chunk_bytes: of the workspace; None: 256 MiB, or 1/32 of a GPU's memory where that is more.
            Results do not depend on it but to rounding.
        backend: "reference", "cpu", "triton" or "cuda"; by default ``PAPO_BACKEND`` or else the
            fastest that serves the logits.
        keep: what each token's sampling filter kept; p is renormalised over that.
        lora: a low-rank addition to `weight`.
        logits_dtype: of the chunk's logits; None: float32 (float64 for float64). For half-precision
            `hidden` the other choice is its own dtype, which rounds every logit to 8 (bfloat16) or
            11 bits: on a CPU, whose half products only give halves, it saves the float32 product.

    Returns:
        TokenStats(logp, entropy, unit_polarity, lse), each shaped like `targets`, as `token_stats`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected; among them a
            weight of zero elements, which is what ZeRO-3 leaves outside a gather.
    """
    inputs, options = prepare(
        hidden,
        targets,
        HeadArguments(weight, bias, lora, logit_scale, keep),
        RowArguments(temperature, softcap, vocab_size),
        ChunkArguments(chunk_bytes, logits_dtype, backend),
    )
    stats = run_linear_token_stats(inputs, options, flat(targets, torch.int64))
    return TokenStats(*shaped(stats, targets))


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    params: PolicyLossParams | None = None,
    weighting: PolarityWeighting | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    keep: KeepSet | None = None,
    lora: LoRAHead | None = None,
    logits_dtype: torch.dtype | None = None,
) -> PolicyLossOutput:
    """`policy_loss` of the logits logit_scale (hidden W^T + bias), which are never held whole.

    The gradients of hidden, weight, bias and the factors of `lora` are formed chunk by chunk in the
    forward pass, three matrix products in all and none computed again, and multiplied by the
    upstream scalar in backward (free where that is 1). Under no_grad there is no gradient work. The
    weight is read in the forward pass only, so under ZeRO-3 it need not be gathered for backward.

    Args:
        hidden, weight, targets, bias, temperature, softcap, logit_scale, vocab_size, chunk_bytes,
            backend, keep, lora, logits_dtype: as for `linear_token_stats`. float16: the gradient of
            the logits is float16 too; a loss scale belongs into `token_weight`, where it keeps
            small gradients from vanishing.
        advantages, token_weight, old_logp, ref_logp, params, weighting: as for `policy_loss`. A
            token of weight 0 contributes exactly nothing, whatever its hidden state holds.

    Returns:
        PolicyLossOutput(loss, logp, entropy, unit_polarity, polarity, weight, ratio, clipped):
        `loss` is a differentiable scalar, the rest is detached and shaped like `targets`.

    Raises:
        TypeError, ValueError: as for `linear_token_stats`.
    """
    inputs, options = prepare(
        hidden,
        targets,
        HeadArguments(weight, bias, lora, logit_scale, keep),
        RowArguments(temperature, softcap, vocab_size),
        ChunkArguments(chunk_bytes, logits_dtype, backend),
    )
    tokens = TokenInputs(advantages, token_weight, old_logp, ref_logp)
    call = prepare_loss(targets, tokens, params, weighting, options)
    loss, *parts = run_linear_policy_loss(inputs, options, call)
    return PolicyLossOutput(loss, *shaped(parts, targets))
