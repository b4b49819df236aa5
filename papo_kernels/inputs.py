"""The public functions' arguments made ready for the operations: checked, flattened to rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import (
    check_device,
    check_float,
    check_positive,
    check_targets,
    check_token_input,
    check_type,
    counted_columns,
)
from .dispatch import filled
from .source import Logits
from .types import (
    LossInputs,
    Objective,
    PolarityWeighting,
    RowParams,
    TokenInputs,
    WeightingInputs,
)

_DEFAULT_OBJECTIVE = Objective()


def row_params(
    columns: int,
    temperature: float,
    softcap: float | None,
    vocab_size: int | None,
    counted: str = "columns of logits",
) -> RowParams:
    """The checked options of rows of `columns`; `counted` says what those are."""
    check_positive("temperature", temperature)
    if softcap is not None:
        check_positive("softcap", softcap, "None or a finite number > 0")
    read = counted_columns(columns, vocab_size, counted)
    return RowParams(float(temperature), float(softcap or 0.0), read)


def held_logits(
    logits: Tensor | Logits, targets: Tensor, temperature: float
) -> tuple[Tensor, RowParams]:
    """The checked tensor `[..., V]`, and how its rows become distributions."""
    values, softcap, vocab_size = logits if isinstance(logits, Logits) else (logits, None, None)
    check_float("logits", values)
    row = row_params(values.shape[-1], temperature, softcap, vocab_size)
    check_targets("logits", values, targets)
    return values, row


def loss_inputs(
    targets: Tensor,
    tokens: TokenInputs,
    objective: Objective | None,
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
    if objective is None:
        objective = _DEFAULT_OBJECTIVE
    check_type("objective", objective, Objective)
    check_token_input("advantages", advantages, targets, source)
    check_token_input("token_weight", token_weight, targets, source)
    if old_logp is not None:
        check_token_input("old_logp", old_logp, targets, source)
        old_logp = flat(old_logp, dtype)
    if ref_logp is not None:
        check_token_input("ref_logp", ref_logp, targets, source)
        ref_logp = flat(ref_logp, dtype)
    elif objective.kl_coef:
        raise ValueError(
            f"ref_logp: expected a tensor, since objective.kl_coef is {objective.kl_coef}"
        )
    return LossInputs(
        flat(targets, torch.int64),
        TokenInputs(flat(advantages, dtype), flat(token_weight, dtype), old_logp, ref_logp),
        objective,
        None if weighting is None else _weighting_inputs(weighting, dtype, targets),
        row,
        backend or "",
    )


def flat(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as a detached, contiguous `[N]` tensor of `dtype`; itself if it is one already."""
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
