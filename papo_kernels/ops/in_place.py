"""The policy loss in place of its logits, where these may be a view of a larger tensor.

Autograd lets a function of several outputs write to a tensor, not to a view. So the loss is one of
the tensor that the logits are a view of, in whose rows the logits lie; its other rows are ignored
ones, whose gradient is 0. A later use of that tensor, or of any view of it, meets the error that a
later use of the logits does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from papo_kernels.types import IGNORE_INDEX, LossInputs

from .policy_loss import run_policy_loss

# What autograd records for a view: its gradient is the base's, in other places.
_VIEWS = (
    *("View", "UnsafeView", "ReshapeAlias", "Alias", "AsStrided", "Slice", "Select", "Squeeze"),
    *("Unsqueeze", "Transpose", "T", "Permute", "Split", "SplitWithSizes", "Unbind"),
)


def run_policy_loss_in_place(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    """`run_policy_loss`, with the gradient in place of `logits [..., V]`. Where there is none to be
    formed, and in a compiled graph, they stay.

    Raises:
        ValueError: that is not safe.
    """
    needed = torch.is_grad_enabled() and logits.requires_grad
    if torch.compiler.is_compiling() or not needed:
        return run_policy_loss(logits, inputs)
    _check(logits)
    base = logits._base
    if base is None:
        return run_policy_loss(logits, inputs, True)
    _check_base(logits, base)
    if logits.numel() == base.numel() and logits.is_contiguous():
        return run_policy_loss(base, inputs, True)
    rows, places = base.numel() // logits.shape[-1], _places(logits, base)
    loss, *parts = run_policy_loss(base, _spread(inputs, places, rows), True)
    return loss, *(x[places] for x in parts)


def _check(logits: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError(
            "inplace: expected False for logits that are a leaf requiring grad: "
            "autograd would lose their value"
        )
    if logits.retains_grad or (logits._base is not None and logits._base.retains_grad):
        raise ValueError(
            "inplace: expected False for logits that retain their gradient: it takes their place"
        )
    if logits._base is None and not logits.is_contiguous():
        raise ValueError(
            f"inplace: expected False for logits that are not contiguous, got strides "
            f"{logits.stride()} for shape {tuple(logits.shape)}"
        )


def _check_base(logits: Tensor, base: Tensor) -> None:
    """Refuse a view whose gradient is not that of whole rows of its base."""
    if base.is_leaf:
        raise ValueError(
            "inplace: expected False for logits that are a view of a leaf requiring grad: "
            "autograd would lose its value"
        )
    node = logits.grad_fn
    while node is not None and node is not base.grad_fn:
        name = node.name()
        if name.rstrip("0123456789").removesuffix("Backward") not in _VIEWS:
            raise ValueError(
                "inplace: expected False for logits that more than indexing and reshaping makes "
                f"of the tensor whose memory they share, got {name}"
            )
        node = node.next_functions[0][0]
    if logits._backward_hooks:
        raise ValueError(
            "inplace: expected False for a view with a hook: the gradient goes to the tensor that "
            "it is a view of"
        )
    if not _is_whole_rows(logits, base):
        raise ValueError(
            "inplace: expected False for a view that is not made of whole rows of one contiguous "
            f"tensor, got strides {logits.stride()} for shape {tuple(logits.shape)}; pass all "
            "logits, with targets of -100 where they do not count, and "
            "Logits(logits, vocab_size=...) for their first columns"
        )
    if logits.grad_fn is None or logits.grad_fn.next_functions[0][0] is not base.grad_fn:
        raise ValueError(
            "inplace: expected False for a view of a view: the gradient goes to the tensor that "
            "both are views of, past what may be hooked to the one in between"
        )


def _is_whole_rows(logits: Tensor, base: Tensor) -> bool:
    """Whether each row of `logits` is one of ``base.view(-1, V)``, and none is there twice."""
    columns, offset = logits.shape[-1], logits.storage_offset() - base.storage_offset()
    if logits.dtype != base.dtype or logits.is_neg() != base.is_neg() or not base.is_contiguous():
        return False
    if logits.stride(-1) != 1 or base.shape[-1] != columns or offset % columns:
        return False
    reached = columns
    leading = zip(logits.stride()[:-1], logits.shape[:-1], strict=True)
    for stride, size in sorted(leading):
        if size == 1:
            continue
        if stride % columns or stride < reached:
            return False
        reached = stride * size
    return True


def _places(logits: Tensor, base: Tensor) -> Tensor:
    """Where the rows of `logits` are among those of its base, `[N]`."""
    columns, offset = logits.shape[-1], logits.storage_offset() - base.storage_offset()
    places = torch.full((), offset // columns, device=logits.device)
    for stride, size in zip(logits.stride()[:-1], logits.shape[:-1], strict=True):
        steps = torch.arange(size, device=logits.device) * (stride // columns)
        places = places[..., None] + steps
    return places.reshape(-1)


def _spread(inputs: LossInputs, places: Tensor, rows: int) -> LossInputs:
    """The inputs of all rows of the base, of which those not at `places` are ignored."""

    def spread(values: Tensor, fill: float) -> Tensor:
        return values.new_full((rows,), fill).index_copy_(0, places, values)

    tokens, row = inputs.tokens, inputs.row
    given = {name: spread(x, 0.0) for name, x in tokens._asdict().items() if x is not None}
    if row.temperatures is not None:
        row = row._replace(temperatures=spread(row.temperatures, 1.0))
    targets = spread(inputs.targets, IGNORE_INDEX)
    return inputs._replace(targets=targets, tokens=tokens._replace(**given), row=row)
