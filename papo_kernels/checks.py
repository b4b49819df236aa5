"""What the public functions accept: each check raises, naming the argument, its value and what was
expected, before anything is launched."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from .ops.token_stats import filled
from .types import (
    LossInputs,
    PolarityWeighting,
    PolicyLossParams,
    RowParams,
    TokenInputs,
    WeightingInputs,
)

_DEFAULT_PARAMS = PolicyLossParams()
HALVES = (torch.float16, torch.bfloat16)
_FLOAT_DTYPES = (*HALVES, torch.float32, torch.float64)


def check_type(name: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{name}: expected {expected.__name__}, got {type(value).__name__}")


def check_float(name: str, value: Tensor) -> None:
    """A floating-point tensor `[..., C]` with C >= 1."""
    check_type(name, value, Tensor)
    if value.dtype not in _FLOAT_DTYPES:
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}"
        )
    if value.dim() == 0 or value.shape[-1] == 0:
        letter = "V" if name == "logits" else "D"
        raise ValueError(
            f"{name}: expected shape [..., {letter}] with {letter} >= 1, got {tuple(value.shape)}"
        )


def check_device(name: str, value: Tensor, device: torch.device, like: str = "logits") -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like {like}, got {value.device}")


def check_positive(name: str, value: float, expected: str = "a finite number > 0") -> None:
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} {value!r}")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_columns(logits: Tensor) -> None:
    """What the GPU kernels, which count columns in 32 bits, can read."""
    if logits.shape[1] > 2**30:
        raise ValueError(f"logits: expected at most 2^30 columns, got {logits.shape[1]}")


def check_dlogits(logits: Tensor, dlogits: Tensor, narrow: tuple[torch.dtype, ...]) -> None:
    """`narrow`: the dtypes that the gradient of float32 logits may have besides float32."""
    narrower = logits.dtype == torch.float32 and dlogits.dtype in narrow
    if dlogits.dtype != logits.dtype and not narrower:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in narrow)
        besides = f", or {names} where those are float32" if names else ""
        raise TypeError(
            f"dlogits: expected {logits.dtype} like logits{besides}, got {dlogits.dtype}"
        )


def check_row_options(
    columns: int,
    temperature: float,
    softcap: float | None,
    vocab_size: int | None,
    counted: str = "columns of logits",
) -> int:
    """Raises for an option out of range; how many of the `columns` to read."""
    check_positive("temperature", temperature)
    if softcap is not None:
        check_positive("softcap", softcap, "None or a finite number > 0")
    if vocab_size is None:
        return columns
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt)):
        raise TypeError(f"vocab_size: expected an int or None, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= columns:
        raise ValueError(
            f"vocab_size: expected a value in [1, {columns}] ({counted}), got {vocab_size}"
        )
    return vocab_size


def check_targets(like: str, rows: Tensor, targets: Tensor) -> None:
    """`targets` against `rows [..., C]`, the tensor called `like`."""
    check_type("targets", targets, Tensor)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")
    if targets.shape != rows.shape[:-1]:
        last = "the vocabulary" if like == "logits" else "its last dimension"
        raise ValueError(
            f"targets: expected shape {tuple(rows.shape[:-1])}, that of {like} "
            f"{tuple(rows.shape)} without {last}, got {tuple(targets.shape)}"
        )
    check_device("targets", targets, rows.device, like)


def check_token_input(name: str, value: Tensor | None, targets: Tensor, source: str) -> None:
    """`source`: what the loss is differentiable in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype.is_complex:
        raise TypeError(f"{name}: expected a real dtype, got {value.dtype}")
    if value.shape != targets.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(targets.shape)} like targets, got {tuple(value.shape)}"
        )
    check_device(name, value, targets.device, "targets")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor without gradient (the loss is differentiable in {source} "
            "only), got requires_grad=True; detach() it"
        )


def loss_inputs(
    targets: Tensor,
    tokens: TokenInputs,
    params: PolicyLossParams | None,
    weighting: PolarityWeighting | None,
    row: RowParams,
    dtype: torch.dtype,
    backend: str | None,
    source: str,
) -> LossInputs:
    """The arguments of a policy loss, checked and flattened to rows.

    Args:
        tokens: shaped like `targets`, of any real dtype; made `dtype`.
        source: what the loss is differentiable in, for messages.
    """
    advantages, token_weight, old_logp, ref_logp = tokens
    if params is None:
        params = _DEFAULT_PARAMS
    check_type("params", params, PolicyLossParams)
    check_token_input("advantages", advantages, targets, source)
    check_token_input("token_weight", token_weight, targets, source)
    if old_logp is not None:
        check_token_input("old_logp", old_logp, targets, source)
        old_logp = flat(old_logp, dtype)
    if ref_logp is not None:
        check_token_input("ref_logp", ref_logp, targets, source)
        ref_logp = flat(ref_logp, dtype)
    elif params.kl_coef:
        raise ValueError(f"ref_logp: expected a tensor, since params.kl_coef is {params.kl_coef}")
    return LossInputs(
        flat(targets, torch.int64),
        TokenInputs(flat(advantages, dtype), flat(token_weight, dtype), old_logp, ref_logp),
        params,
        None if weighting is None else _weighting_inputs(weighting, dtype, targets),
        row,
        backend or "",
    )


def flat(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` detached, contiguous `[N]`, in `dtype`; itself where it is all that."""
    if value.dim() != 1:
        value = value.reshape(-1)
    if value.requires_grad:
        value = value.detach()
    if value.dtype != dtype:
        value = value.to(dtype)
    return value if value.is_contiguous() else value.contiguous()


def shaped(values: Sequence[Tensor], targets: Tensor) -> Sequence[Tensor]:
    """The inverse of `flat`: `values [N]` in the shape of `targets`."""
    return values if targets.dim() == 1 else [x.view_as(targets) for x in values]


def _weighting_inputs(
    weighting: PolarityWeighting, dtype: torch.dtype, targets: Tensor
) -> WeightingInputs:
    check_type("weighting", weighting, PolarityWeighting)

    def scalar(name: str, value: float | Tensor) -> Tensor:
        """`value` as a 0-dim tensor beside the targets, without a host sync."""
        if not isinstance(value, Tensor):
            return filled(value, dtype, targets)
        check_device(f"weighting.{name}", value, targets.device)
        return value.detach().to(dtype)

    return WeightingInputs(
        float(weighting.strength),
        scalar("phase", weighting.phase),
        weighting.shape,
        scalar("sigma", weighting.sigma),
        scalar("scale", weighting.scale),
        float(weighting.dead_zone),
    )
