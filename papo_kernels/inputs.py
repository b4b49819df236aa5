"""The public functions' arguments made ready for the operations: checked, flattened to rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_device,
    check_factor,
    check_float,
    check_targets,
    check_tensor,
    check_token_input,
    check_type,
    check_vocab_size,
    counted_columns,
)
from .dispatch import filled
from .objective import Objective, PolarityWeighting
from .types import (
    Logits,
    LossInputs,
    RowParams,
    TokenInputs,
    WeightingInputs,
)

_DEFAULT_OBJECTIVE = Objective()


def held_logits(
    logits: Tensor | Logits, targets: Tensor, temperature: float
) -> tuple[Tensor, RowParams]:
    """The checked tensor `[..., V]`, and how its rows become distributions."""
    values, softcap, vocab_size = logits, None, None
    if isinstance(logits, Logits):
        values, softcap, vocab_size = logits.values, logits.softcap, logits.vocab_size
        if softcap is not None:
            check_factor("softcap", softcap, "None or ")
        check_vocab_size(vocab_size)
    if not isinstance(values, Tensor):
        raise TypeError(
            "logits: expected a tensor, Logits(tensor) or what calling a Head gives, "
            f"head(hidden); got {type(values).__name__}"
        )
    check_float("logits", values)
    check_factor("temperature", temperature)
    columns = counted_columns(values.shape[-1], vocab_size, "columns of logits")
    check_targets("logits", values, targets)
    return values, RowParams(float(temperature), float(softcap or 0.0), columns)


def targets_of_rows(logits: object, targets: Tensor) -> Tensor:
    """`targets` where they are one a row, or of several ids each row's first.

    Args:
        logits: as the public functions take them; unchecked, as `targets` are.
    """
    if isinstance(logits, tuple):  # the logits of a head
        logits = logits[0]
    elif isinstance(logits, Logits):
        logits = logits.values
    if not (isinstance(logits, Tensor) and isinstance(targets, Tensor)):
        return targets
    if targets.dim() != logits.dim() or not targets.dim():
        return targets
    check_tensor("targets", targets)
    if targets.shape[-1] == 0:
        raise ValueError(f"targets: expected an id a row, got shape {tuple(targets.shape)}")
    return targets[..., 0]


def flat_ids(targets: Tensor, rows: Tensor) -> Tensor:
    """Checked `targets` as `[N]`, or where `rows` are their first as `[N, k]`."""
    flattened = flat(targets, torch.int64)
    return flattened if rows is targets else flattened.view(-1, targets.shape[-1])


class LossArguments(NamedTuple):
    """What `policy_loss` takes beside the logits, as it takes it."""

    targets: Tensor
    tokens: TokenInputs
    objective: Objective | None
    weighting: PolarityWeighting | None

    def checked(self, row: RowParams, dtype: torch.dtype, backend: str, source: str) -> LossInputs:
        """The same, checked and flattened to rows.

        Args:
            dtype: of the sums; the tokens' inputs are made it.
            source: what the loss is differentiable in, for messages.
        """
        targets, tokens, objective, weighting = self
        if objective is None:
            objective = _DEFAULT_OBJECTIVE
        check_type("objective", objective, Objective)
        advantages, token_weight, old_logp, ref_logp, *_ = tokens
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
            backend,
        )


def flat(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as a detached, contiguous `[N]` tensor of `dtype`; itself if it is one already."""
    if value.dim() != 1:
        value = value.reshape(-1)
    if value.requires_grad:
        value = value.detach()
    if value.dtype != dtype:
        value = value.to(dtype)
    if value.is_neg():
        value = value.resolve_neg()
    return value if value.is_contiguous() else value.contiguous()


def shaped(
    values: Sequence[Tensor], targets: Tensor, rows: Tensor | None = None
) -> Sequence[Tensor]:
    """The inverse of `flat` and `flat_ids`: `values [N]` in the shape of `targets`, or of `rows`
    where `values [N, k]` have that of `targets`."""
    if rows is not None and rows is not targets:
        return [x.view(targets.shape if x.dim() == 2 else rows.shape) for x in values]
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
        return value.detach().to(dtype).resolve_neg()

    return WeightingInputs(
        float(weighting.strength),
        scalar("phase", weighting.phase),
        weighting.shape,
        scalar("sigma", weighting.sigma),
        scalar("scale", weighting.scale),
        float(weighting.dead_zone),
    )
