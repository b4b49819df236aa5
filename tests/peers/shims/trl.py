"""TRL's log-probs and entropies on papo_kernels: of logits, and of hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from papo_kernels import Compute, Head, token_stats


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """`selective_log_softmax`, which returns what it computes in the dtype of the logits."""
    if row_mask is not None:
        index = index.masked_fill(row_mask == 0, -100)
    return token_stats(logits, index, temperature=temperature).logp.to(logits.dtype)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """`entropy_from_logits`, which returns what it computes in the dtype of the logits."""
    index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return token_stats(logits, index).entropy.to(logits.dtype)


def chunked_log_prob(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`_ChunkedLogProbFunction.apply`; before it had a bias, it gave two tensors."""
    has_bias = isinstance(arguments[1], Tensor)
    bias, *arguments = arguments if has_bias else (None, *arguments)
    targets, temperature, _, softcap, logit_scale = (*arguments, None, 1.0)[:5]
    head = Head(weight, bias, softcap=softcap, logit_scale=logit_scale)
    # Its logits have the dtype of the hidden states.
    compute = Compute(full_stats=True, logits_dtype=hidden.dtype)
    stats = token_stats(head(hidden), targets, temperature=temperature, compute=compute)
    if not has_bias:
        return stats.logp, stats.entropy
    return stats.logp, stats.entropy, stats.log_sum_sq_probs, stats.mean_logits, stats.is_top1


MODULES = ("trl",)
FUNCTIONS = {
    "selective_log_softmax": selective_log_softmax,
    "entropy_from_logits": entropy_from_logits,
}
METHODS = {"_ChunkedLogProbFunction.apply": chunked_log_prob}
