"""What the public functions accept: each check raises, naming the argument, its value and what was
expected, before anything is launched."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .types import (
    LossInputs,
    LossOptions,
    PolarityWeighting,
    PolicyLossParams,
    RowParams,
    TokenInputs,
)

_DEFAULT_PARAMS = PolicyLossParams()
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_type(name: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{name}: expected {expected.__name__}, got {type(value).__name__}")


def check_float(name: str, value: Tensor) -> None:
    """A floating-point tensor `[..., C]` with C >= 1."""
    check_type(name, value, Tensor)
    if value.dtype not in FLOAT_DTYPES:
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


def check_row_options(
    columns: int,
    temperature: float,
    softcap: float | None,
    vocab_size: int | None,
    counted: str = "columns of logits",
) -> int:
    """Raises for an option out of range; how many of the `columns` to read."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap: expected None or a finite number > 0, got {softcap!r}")
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
    params = _DEFAULT_PARAMS if params is None else params
    check_type("params", params, PolicyLossParams)
    for name, value in tokens._asdict().items():
        if value is not None or name in ("advantages", "token_weight"):
            check_token_input(name, value, targets, source)
    if params.kl_coef and tokens.ref_logp is None:
        raise ValueError(f"ref_logp: expected a tensor, since params.kl_coef is {params.kl_coef}")
    phase, sigma, scale = _weighting_scalars(weighting, dtype, targets.device)
    options = LossOptions(
        float(row.temperature),
        float(row.softcap),
        float(params.clip_low),
        float(params.clip_high),
        float(params.dual_clip or 0.0),
        float(params.kl_coef),
        float(params.entropy_coef),
        0.0 if weighting is None else float(weighting.strength),
        0.0 if weighting is None else float(weighting.dead_zone),
    )
    return LossInputs(
        flat(targets, targets.dtype),
        flat(tokens.advantages, dtype),
        flat(tokens.token_weight, dtype),
        None if tokens.old_logp is None else flat(tokens.old_logp, dtype),
        None if tokens.ref_logp is None else flat(tokens.ref_logp, dtype),
        phase,
        sigma,
        scale,
        "sign" if weighting is None else weighting.shape,
        list(options),
        row.vocab_size,
        backend or "",
    )


def flat(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` detached, contiguous `[N]`, in `dtype`; itself where it is all that."""
    if (
        value.dtype == dtype
        and value.dim() == 1
        and not value.requires_grad
        and value.is_contiguous()
    ):
        return value
    return value.detach().reshape(-1).to(dtype).contiguous()


def _weighting_scalars(
    weighting: PolarityWeighting | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """phase, sigma and scale as 0-dim tensors on `device`, without a host sync."""
    if weighting is None:
        return None, None, None
    check_type("weighting", weighting, PolarityWeighting)
    scalars = []
    for name in ("phase", "sigma", "scale"):
        value = getattr(weighting, name)
        if isinstance(value, Tensor):
            check_device(f"weighting.{name}", value, device)
            scalars.append(value.detach().to(dtype))
        else:
            scalars.append(torch.full((), value, dtype=dtype, device=device))
    phase, sigma, scale = scalars
    return phase, sigma, scale
