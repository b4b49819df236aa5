"""Token weights of the usual aggregations: a loss mask times its normalizer, 0 where nothing is
left to divide by."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_at_least, check_type

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


def normalized_mask(
    mask: Tensor,
    aggregation: str = "token-mean",
    *,
    total: float | Tensor | None = None,
    constant_length: int | None = None,
) -> Tensor:
    """A loss mask times the normalizer of an aggregation: a `token_weight` for `policy_loss`.

        token-mean               mask / tokens
        seq-mean-token-mean      mask / (tokens of the sequence * sequences)
        seq-mean-token-sum       mask / sequences
        seq-mean-token-sum-norm  mask / (constant_length * sequences)

    The names are verl's and OpenRLHF's (`loss_agg_mode`). TRL's `loss_type` calls the first "dapo"
    (or "bnpo", without `total`), the second "grpo", the third "luspo" and the last "dr_grpo".

    Args:
        mask: ``[..., T]``, bool or 0 and 1, a sequence a row. `sequence_weights` serves sequences
            that are packed.
        total: how many tokens ("token-mean") or sequences (the others) the whole optimizer step
            has, over all ranks and micro-batches: a number or a 0-dim tensor beside `mask`. Where
            gradients are averaged over ranks and not summed, that count divided by their number.
            None: the tokens of `mask`, or its sequences with at least one.
        constant_length: of "seq-mean-token-sum-norm", >= 1: TRL's `max_completion_length`, verl's
            `loss_scale_factor`.

    Returns:
        Like `mask`, float32 (float64 for a float64 mask). A mask of zeros gives zeros, and so does
        a `total` of 0.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """
    check_type("mask", mask, Tensor)
    if mask.dim() == 0:
        raise ValueError("mask: expected shape [..., T], got a 0-dim tensor")
    kept = mask != 0
    weights = sequence_weights(
        kept.sum(-1), aggregation, total=total, constant_length=constant_length
    )
    dtype = torch.float64 if mask.dtype == torch.float64 else torch.float32
    return torch.where(kept, weights[..., None], 0.0).to(dtype)


def sequence_weights(
    lengths: Tensor,
    aggregation: str = "token-mean",
    *,
    total: float | Tensor | None = None,
    constant_length: int | None = None,
) -> Tensor:
    """The weight of each token of a sequence, for sequences of which only the lengths are at hand.

    Packed tokens get ``sequence_weights(lengths).repeat_interleave(lengths)``.

    Args:
        lengths: ``[...]`` the tokens of each sequence that the loss mask keeps.
        aggregation, total, constant_length: as for `normalized_mask`.

    Returns:
        Like `lengths`, float64; 0 for a sequence without tokens, NaN where a length or `total` is.

    Raises:
        TypeError, ValueError: as for `normalized_mask`.
    """
    _check(aggregation, constant_length)
    check_type("lengths", lengths, Tensor)
    lengths = lengths.double()
    if total is None:
        counted = lengths if aggregation == "token-mean" else (lengths > 0).double()
        count = counted.sum()
    else:
        _check_total(total)
        count = torch.zeros((), dtype=torch.float64, device=lengths.device) + total
    if aggregation == "seq-mean-token-mean":
        divisor = count * lengths
    else:
        divisor = (count * (constant_length or 1)).expand_as(lengths)
    return torch.where((lengths == 0) | (divisor == 0), 0.0, 1.0 / divisor)


def _check_total(total: object) -> None:
    if not isinstance(total, Tensor):
        check_at_least("total", total, 0.0)
    elif total.dim() != 0:
        raise ValueError(
            f"total: expected a number or a 0-dim tensor, got shape {tuple(total.shape)}"
        )


def _check(aggregation: str, constant_length: int | None) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation: expected one of {AGGREGATIONS}, got {aggregation!r}")
    if aggregation != "seq-mean-token-sum-norm":
        if constant_length is not None:
            raise ValueError(
                f"constant_length: expected None for aggregation {aggregation!r}, got "
                f"{constant_length!r}"
            )
    elif isinstance(constant_length, bool) or not isinstance(constant_length, int):
        raise TypeError(f"constant_length: expected an int, got {constant_length!r}")
    elif constant_length < 1:
        raise ValueError(f"constant_length: expected at least 1, got {constant_length}")
