"""From hidden states and the head's weight to statistics and loss, without the logits tensor.

Logits exist a chunk of tokens at a time, in one workspace that does not grow with N or V.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import linear_ops
from .checks import (
    check_device,
    check_float,
    check_row_options,
    check_targets,
    check_type,
    loss_inputs,
)
from .keep import KeepSet
from .linear_chunks import Needs
from .linear_passes import HeadInputs, HeadOptions, check_gathered
from .types import (
    PolarityWeighting,
    PolicyLossOutput,
    PolicyLossParams,
    RowParams,
    TokenInputs,
    TokenStats,
    acc_dtype,
)


class LoRAHead(NamedTuple):
    """A low-rank addition to the head: logits += scaling (h A^T) B^T. B A is never formed.

    Attributes:
        a: ``[r, D]``, of the weight's dtype.
        b: ``[V, r]``, of the weight's dtype.
        scaling: alpha / r.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0


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
    logits of each chunk again. Memory beyond inputs, outputs and gradients: the workspace, and for
    a half-precision weight whose tokens need several slabs its gradient's float32 sum.

    Args:
        hidden: ``[..., D]`` float16, bfloat16, float32, or float64 (reference and cpu backends).
        weight: ``[V, D]`` like `hidden`. Under ``torch.autocast`` both are cast as ``F.linear``
            casts them. Where one does not require grad, its gradient costs nothing.
        targets: ``[...]`` int64, the sampled tokens; -100: ignored. Ignored rows are not multiplied
            on a CPU; a GPU multiplies them, so as not to wait for their number.
        bias: ``[V]`` like `weight`; -inf masks a token.
        temperature: > 0.
        softcap: u = softcap * tanh(z / softcap) / temperature; > 0, None for none.
        logit_scale: a factor on the logits before the soft cap (Cohere; Granite's divisor is its
            inverse); > 0.
        vocab_size: rows of `weight` from there on are padding: never read, p = 0, gradient 0.
        chunk_bytes: size of the workspace; None: 256 MiB, or 1/32 of a GPU's memory where that is
            more. Results do not depend on it but to rounding.
        backend: "reference", "cpu", "triton" or "cuda"; by default ``PAPO_BACKEND`` or else the
            fastest that serves the logits.
        keep: the ids that each token's sampling filter kept: the statistics are those of the
            distribution renormalised over them.
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
    arguments = HeadArguments(
        bias,
        temperature,
        softcap,
        logit_scale,
        vocab_size,
        chunk_bytes,
        backend,
        keep,
        lora,
        logits_dtype,
    )
    inputs, options = prepare(hidden, weight, targets, arguments)
    *outputs, _ = linear_ops.run_linear_token_stats(
        *inputs, targets.reshape(-1).contiguous(), *options
    )
    return TokenStats(*(x.view(targets.shape) for x in outputs))


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
    arguments = HeadArguments(
        bias,
        temperature,
        softcap,
        logit_scale,
        vocab_size,
        chunk_bytes,
        backend,
        keep,
        lora,
        logits_dtype,
    )
    inputs, options = prepare(hidden, weight, targets, arguments)
    call = loss_inputs(
        targets,
        TokenInputs(advantages, token_weight, old_logp, ref_logp),
        params,
        weighting,
        RowParams(options.temperature, options.softcap, options.vocab_size),
        acc_dtype(options.logits_dtype),
        backend,
        source=SOURCE,
    )
    needs = wanted_gradients(inputs)
    loss, *parts = linear_ops.linear_policy_loss(
        *inputs,
        *call,
        options.lora_scaling,
        options.logits_dtype,
        options.chunk_bytes,
        list(needs),
    )
    return PolicyLossOutput(loss, *(x.view(targets.shape) for x in parts[:7]))


# ---- validation ---------------------------------------------------------------------------------

SOURCE = "hidden, weight, bias and lora"  # what the loss is differentiable in


class HeadArguments(NamedTuple):
    """The keyword arguments that all functions of hidden states share."""

    bias: Tensor | None
    temperature: float
    softcap: float | None
    logit_scale: float | None
    vocab_size: int | None
    chunk_bytes: int | None
    backend: str | None
    keep: KeepSet | None
    lora: LoRAHead | None
    logits_dtype: torch.dtype | None


def prepare(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    arguments: HeadArguments,
    rows: int | None = None,
) -> tuple[HeadInputs, HeadOptions]:
    """The arguments of a call, checked, cast as autocast asks and flattened to rows.

    Args:
        rows: of the whole weight, where `weight` is one rank's shard of it.
    """
    bias, lora = arguments.bias, arguments.lora
    check_float("hidden", hidden)
    check_type("weight", weight, Tensor)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        lora = None if lora is None else lora._replace(a=lora.a.to(dtype), b=lora.b.to(dtype))
    _check_weight(hidden, weight, shard=rows is not None)
    total = weight.shape[0] if rows is None else rows
    columns = check_row_options(
        total, arguments.temperature, arguments.softcap, arguments.vocab_size, "rows of weight"
    )
    scale = _positive("logit_scale", arguments.logit_scale)
    check_targets("hidden", hidden, targets)
    if bias is not None:
        _check_like_weight("bias", bias, weight, (weight.shape[0],))
    if lora is not None:
        _check_lora(lora, weight)
    offsets, ids = _checked_keep(arguments.keep, targets)
    inputs = HeadInputs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        None if lora is None else lora.a,
        None if lora is None else lora.b,
        offsets,
        ids,
    )
    options = HeadOptions(
        # softcap(s z) / temperature, with the scale s moved into the other two.
        float(arguments.temperature) / scale,
        float(arguments.softcap or 0.0) / scale,
        1.0 if lora is None else float(lora.scaling),
        columns,
        _logits_dtype(arguments.logits_dtype, hidden.dtype),
        _workspace(arguments.chunk_bytes),
        arguments.backend or "",
    )
    return inputs, options


def wanted_gradients(inputs: HeadInputs) -> Needs:
    """Which of hidden, weight, bias, lora_a and lora_b will be asked for a gradient."""
    grad = torch.is_grad_enabled()
    return Needs(*(grad and x is not None and x.requires_grad for x in inputs[:5]))


def _check_weight(hidden: Tensor, weight: Tensor, shard: bool) -> None:
    check_gathered(weight, allow_empty=shard)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [V, D], got {tuple(weight.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        hint = ""
        if hidden.shape[-1] == weight.shape[0]:
            hint = "; these look like logits, which token_stats and policy_loss take"
        raise ValueError(
            f"hidden: expected shape [..., {weight.shape[1]}], as weight is "
            f"{tuple(weight.shape)}, got {tuple(hidden.shape)}{hint}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"weight: expected {hidden.dtype} like hidden, got {weight.dtype}; cast one of them "
            "or call under torch.autocast"
        )
    check_device("weight", weight, hidden.device, "hidden")


def _check_like_weight(name: str, value: Tensor, weight: Tensor, shape: tuple[int, ...]) -> None:
    check_type(name, value, Tensor)
    if value.shape != shape:
        raise ValueError(
            f"{name}: expected shape {shape}, as weight is {tuple(weight.shape)}, got "
            f"{tuple(value.shape)}"
        )
    if value.dtype != weight.dtype:
        raise TypeError(f"{name}: expected {weight.dtype} like weight, got {value.dtype}")
    check_device(name, value, weight.device, "weight")


def _check_lora(lora: LoRAHead, weight: Tensor) -> None:
    check_type("lora", lora, LoRAHead)
    check_type("lora.a", lora.a, Tensor)
    rank = lora.a.shape[0] if lora.a.dim() else 0
    if rank == 0:
        raise ValueError(
            f"lora.a: expected shape [r, {weight.shape[1]}] with r >= 1, got {tuple(lora.a.shape)}"
        )
    _check_like_weight("lora.a", lora.a, weight, (rank, weight.shape[1]))
    _check_like_weight("lora.b", lora.b, weight, (weight.shape[0], rank))
    if isinstance(lora.scaling, bool) or not isinstance(lora.scaling, (int, float)):
        raise TypeError(f"lora.scaling: expected a number, got {type(lora.scaling).__name__}")
    if not math.isfinite(lora.scaling):
        raise ValueError(f"lora.scaling: expected a finite number, got {lora.scaling!r}")


def _checked_keep(keep: KeepSet | None, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if keep is None:
        return None, None
    check_type("keep", keep, KeepSet)
    for name, value in keep._asdict().items():
        check_type(f"keep.{name}", value, Tensor)
        if value.dtype != torch.int64:
            raise TypeError(f"keep.{name}: expected int64, got {value.dtype}")
        if value.dim() != 1:
            raise ValueError(f"keep.{name}: expected one dimension, got {tuple(value.shape)}")
        check_device(f"keep.{name}", value, targets.device, "targets")
    if keep.offsets.shape[0] != targets.numel() + 1:
        raise ValueError(
            f"keep.offsets: expected {targets.numel() + 1} values, one more than there are "
            f"targets, got {keep.offsets.shape[0]}"
        )
    return keep.offsets.contiguous(), keep.ids.contiguous()


def _positive(name: str, value: float | None) -> float:
    if value is None:
        return 1.0
    if not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected None or a finite number > 0, got {value!r}")
    return float(value)


def _logits_dtype(requested: torch.dtype | None, hidden: torch.dtype) -> torch.dtype:
    if requested is None:
        return acc_dtype(hidden)
    if requested not in (hidden, acc_dtype(hidden)):
        raise TypeError(
            f"logits_dtype: expected None, {acc_dtype(hidden)} or {hidden}, that of hidden, got "
            f"{requested}"
        )
    return requested


def _workspace(chunk_bytes: int | None) -> int:
    if chunk_bytes is None:
        return 0
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int):
        raise TypeError(f"chunk_bytes: expected an int or None, got {type(chunk_bytes).__name__}")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected at least 1, got {chunk_bytes}")
    return chunk_bytes
