"""What the functions of hidden states accept, made ready for `linear_passes.py`: the counterpart of
`checks.py`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from papo_kernels.checks import (
    check_device,
    check_float,
    check_positive,
    check_row_options,
    check_targets,
    check_type,
    loss_inputs,
)
from papo_kernels.types import (
    LoRAHead,
    LossInputs,
    PolarityWeighting,
    PolicyLossParams,
    RowParams,
    TokenInputs,
    acc_dtype,
)

from .keep import KeepSet
from .passes import HeadInputs, HeadOptions, check_gathered


class HeadArguments(NamedTuple):
    """What makes logits of hidden states, as the public functions take it."""

    weight: Tensor
    bias: Tensor | None
    lora: LoRAHead | None
    logit_scale: float | None
    keep: KeepSet | None


class RowArguments(NamedTuple):
    """What makes a distribution of logits, as the public functions take it."""

    temperature: float
    softcap: float | None
    vocab_size: int | None


class ChunkArguments(NamedTuple):
    """How it is computed, as the public functions take it."""

    chunk_bytes: int | None
    logits_dtype: torch.dtype | None
    backend: str | None


def prepare(
    hidden: Tensor,
    targets: Tensor,
    head: HeadArguments,
    row: RowArguments,
    chunks: ChunkArguments,
    rows: int | None = None,
) -> tuple[HeadInputs, HeadOptions]:
    """The arguments of a call, checked, cast as autocast asks and flattened to rows.

    Args:
        rows: of the whole weight, where `head.weight` is one rank's shard of it.
    """
    check_float("hidden", hidden)
    check_type("weight", head.weight, Tensor)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, head = hidden.to(dtype), _cast(head, dtype)
    weight, bias, lora, logit_scale, keep = head
    _check_weight(hidden, weight, shard=rows is not None)
    total = weight.shape[0] if rows is None else rows
    columns = check_row_options(total, *row, counted="rows of weight")
    scale = 1.0
    if logit_scale is not None:
        check_positive("logit_scale", logit_scale, "None or a finite number > 0")
        scale = float(logit_scale)
    check_targets("hidden", hidden, targets)
    if bias is not None:
        _check_like_weight("bias", bias, weight, (weight.shape[0],))
    if lora is not None:
        _check_lora(lora, weight)
    offsets, ids = _checked_keep(keep, targets)
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
        RowParams(float(row.temperature) / scale, float(row.softcap or 0.0) / scale, columns),
        chunks.backend or "",
        1.0 if lora is None else float(lora.scaling),
        _logits_dtype(chunks.logits_dtype, hidden.dtype),
        _workspace(chunks.chunk_bytes),
    )
    return inputs, options


def prepare_loss(
    targets: Tensor,
    tokens: TokenInputs,
    params: PolicyLossParams | None,
    weighting: PolarityWeighting | None,
    options: HeadOptions,
) -> LossInputs:
    """The arguments of a policy loss beside those that `prepare` made `options` of."""
    row, dtype = options.row, acc_dtype(options.logits_dtype)
    source = "hidden, weight, bias and lora"
    return loss_inputs(targets, tokens, params, weighting, row, dtype, options.backend, source)


def _cast(head: HeadArguments, dtype: torch.dtype) -> HeadArguments:
    bias, lora = head.bias, head.lora
    return head._replace(
        weight=head.weight.to(dtype),
        bias=None if bias is None else bias.to(dtype),
        lora=None if lora is None else lora._replace(a=lora.a.to(dtype), b=lora.b.to(dtype)),
    )


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
    if not -math.inf < lora.scaling < math.inf:
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
