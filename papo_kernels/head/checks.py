"""A head's call made ready for `passes.py`: checked, cast as autocast asks, flattened to rows."""

from __future__ import annotations

import torch
from torch import Tensor

from papo_kernels.checks import (
    check_device,
    check_float,
    check_targets,
    check_tensor,
    check_type,
    counted_columns,
)
from papo_kernels.inputs import LossArguments, row_params
from papo_kernels.types import Compute, LossInputs, acc_dtype

from .head import Head, LazyLogits, LoRA
from .keep import KeepSet
from .passes import Operands, PassOptions

UNKNOWN = -1


def prepare(
    logits: LazyLogits,
    targets: Tensor,
    temperature: float | Tensor,
    compute: Compute,
    rows: int | None = None,
) -> tuple[Operands, PassOptions]:
    """The operands and options of a call.

    Args:
        rows: of the whole weight, where the head holds one rank's shard of it; UNKNOWN where the
            ranks have yet to tell, so that `vocab_size` cannot be checked.
    """
    check_type("compute", compute, Compute)
    hidden, head, keep = logits
    _check_tensors(hidden, head)
    weight, bias, lora = head.weight, head.bias, head.lora
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        lora = None if lora is None else lora._replace(a=lora.a.to(dtype), b=lora.b.to(dtype))
    check_gathered(weight, shard=rows is not None)
    _check_weight(hidden, weight)
    columns = 0
    if rows != UNKNOWN:
        total = weight.shape[0] if rows is None else rows
        columns = counted_columns(total, head.vocab_size, "rows of weight")
    check_targets("hidden", hidden, targets)
    if bias is not None:
        _check_like_weight("bias", bias, weight, (weight.shape[0],))
    if lora is not None:
        _check_lora(lora, weight)
    offsets, ids = _checked_keep(keep, targets)
    operands = Operands(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        None if lora is None else lora.a,
        None if lora is None else lora.b,
        offsets,
        ids,
    )
    logits_dtype = _logits_dtype(compute.logits_dtype, hidden.dtype)
    scale, sums = float(head.logit_scale or 1.0), acc_dtype(logits_dtype)
    options = PassOptions(
        row_params(temperature, head.softcap, columns, targets, sums, scale),
        compute.backend or "",
        1.0 if lora is None else float(lora.scaling),
        logits_dtype,
        compute.chunk_bytes or 0,
    )
    return operands, options


def loss_inputs(loss: LossArguments | None, options: PassOptions) -> LossInputs | None:
    """The checked arguments of a loss, None for statistics."""
    if loss is None:
        return None
    dtype = acc_dtype(options.logits_dtype)
    source = "the hidden states, weight, bias and lora"
    return loss.checked(options.row, dtype, options.backend, source)


def check_gathered(weight: Tensor, shard: bool = False) -> None:
    """ZeRO-3 leaves a tensor of zero elements in place of a partitioned weight. A `shard` of a
    vocabulary may have no rows."""
    if weight.numel() == 0 and not (shard and weight.dim() == 2):
        raise ValueError(
            f"weight: expected [V, D] with V >= 1, got shape {tuple(weight.shape)}: zero elements. "
            "A weight partitioned by DeepSpeed ZeRO-3 was used outside a gather; call inside "
            "deepspeed.zero.GatheredParameters([weight]) or a module that reads it"
        )


def _check_tensors(hidden: Tensor, head: Head) -> None:
    check_float("hidden", hidden)
    if hidden.device.type == "meta":
        raise ValueError("hidden: expected a tensor with values, got one on meta")
    for name, tensor in (("weight", head.weight), ("bias", head.bias)):
        if tensor is not None:
            check_tensor(name, tensor)
    if head.lora is not None:
        check_tensor("lora.a", head.lora.a)
        check_tensor("lora.b", head.lora.b)


def _check_weight(hidden: Tensor, weight: Tensor) -> None:
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
    if value.shape != shape:
        raise ValueError(
            f"{name}: expected shape {shape}, as weight is {tuple(weight.shape)}, got "
            f"{tuple(value.shape)}"
        )
    if value.dtype != weight.dtype:
        raise TypeError(f"{name}: expected {weight.dtype} like weight, got {value.dtype}")
    check_device(name, value, weight.device, "weight")


def _check_lora(lora: LoRA, weight: Tensor) -> None:
    rank = lora.a.shape[0] if lora.a.dim() else 0
    if rank == 0:
        raise ValueError(
            f"lora.a: expected shape [r, {weight.shape[1]}] with r >= 1, got {tuple(lora.a.shape)}"
        )
    _check_like_weight("lora.a", lora.a, weight, (rank, weight.shape[1]))
    _check_like_weight("lora.b", lora.b, weight, (weight.shape[0], rank))


def _checked_keep(keep: KeepSet | None, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if keep is None:
        return None, None
    check_type("keep", keep, KeepSet)
    for name, value in keep._asdict().items():
        check_tensor(f"keep.{name}", value)
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
        wide = "" if acc_dtype(hidden) == hidden else f"{acc_dtype(hidden)} or "
        raise TypeError(
            f"logits_dtype: expected None, {wide}{hidden}, that of hidden, got {requested}"
        )
    return requested
