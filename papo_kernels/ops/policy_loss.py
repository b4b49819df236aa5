"""The policy loss of logits as torch operations, out of place and in place, and its autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from papo_kernels.backends.targets import check_target_values
from papo_kernels.dispatch import kernel_or_operation
from papo_kernels.types import LossInputs, acc_dtype

from .common import as_rows, backend_for, refuse_double_backward, run_scale_, scaled
from .schema import LOSS_SCHEMA, flattened, unflattened

# The fields of `PolicyLossOutput`.
OUTPUT_SCHEMA = (
    "Tensor loss, Tensor logp, Tensor entropy, Tensor unit_polarity, Tensor polarity, "
    "Tensor weight, Tensor ratio, Tensor clip_side"
)


def fake_policy_loss(like: Tensor) -> tuple[Tensor, ...]:
    n, acc = like.shape[0], acc_dtype(like.dtype)
    parts = (like.new_empty(n, dtype=acc) for _ in range(6))
    return like.new_empty((), dtype=acc), *parts, like.new_empty(n, dtype=torch.uint8)


# ---- the operations -----------------------------------------------------------------------------


def _kernel(logits: Tensor, inputs: LossInputs, dlogits: Tensor | None) -> tuple[Tensor, ...]:
    """Each token's loss, then the other fields of `PolicyLossOutput`; `dlogits [N, V]` receives the
    gradient of the sum."""
    targets, tokens, objective, weighting, row, backend = inputs[:6]
    check_target_values(targets, row.vocab_size)
    return backend_for(backend, logits).policy_loss_fwd(
        logits, targets, tokens, objective, weighting, row, dlogits
    )


@custom_op(
    "papo::policy_loss",
    mutates_args=(),
    schema=f"(Tensor logits, {LOSS_SCHEMA}, bool needs_grad) -> ({OUTPUT_SCHEMA}, Tensor dlogits)",
)
def policy_loss(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The fields of `PolicyLossOutput`, then the gradient of the loss (`[0]` if not needed)."""
    *arguments, needs_grad = rest
    dlogits = logits.new_empty(logits.shape if needs_grad else (0,))
    inputs = unflattened(arguments)
    token_loss, *parts = _kernel(logits, inputs, dlogits if needs_grad else None)
    return token_loss.sum(), *parts, dlogits


@policy_loss.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs_grad = rest[-1]
    return *fake_policy_loss(logits), logits.new_empty(logits.shape if needs_grad else (0,))


@custom_op(
    "papo::policy_loss_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {LOSS_SCHEMA}) -> ({OUTPUT_SCHEMA})",
)
def policy_loss_(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The fields of `PolicyLossOutput`; the logits become the gradient of the loss."""
    token_loss, *parts = _kernel(logits, unflattened(arguments), logits)
    return token_loss.sum(), *parts


@policy_loss_.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return fake_policy_loss(logits)


# ---- autograd -----------------------------------------------------------------------------------


class FormedLoss(torch.autograd.Function):
    """A loss whose gradients were formed along with it.

    In place, the one input is also an output, as it is of any in-place operation. A later use of
    the input therefore sends a gradient to that output, where it is refused. An earlier use that
    saved the input fails autograd's own version check.

    Args:
        losses: their sum is the loss: each token's, or the sum itself.
        grads: of the loss, one for each of `inputs`; None for an input that needs none.
        inplace: the gradient is in the storage of the one input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        losses: Tensor,
        grads: Sequence[Tensor | None],
        backend: str,
        inplace: bool,
        *inputs: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.inplace, ctx.spent = backend, inplace, False
        if not inplace:
            ctx.save_for_backward(*grads)
            return losses.sum()
        ctx.mark_dirty(*inputs)
        ctx.save_for_backward(*inputs)
        return losses.sum(), inputs[0]

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, g_input: Tensor | None = None) -> tuple[Any, ...]:
        refuse_double_backward()
        if g_input is not None:
            raise RuntimeError(
                "policy_loss(compute=Compute(inplace=True)) overwrote the logits with their "
                "gradient, but another part of the loss uses them too; pass Compute(inplace=False)"
            )
        if g_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        if not ctx.inplace:
            return None, None, None, None, *scaled(ctx.saved_tensors, g_loss, ctx.backend)
        if ctx.spent:
            raise RuntimeError(
                "policy_loss(compute=Compute(inplace=True)) can be differentiated once: its "
                "gradient buffer was handed on; pass Compute(inplace=False) to go backward twice"
            )
        ctx.spent = True
        dlogits = ctx.saved_tensors[0].detach()
        run_scale_(dlogits.view(-1, dlogits.shape[-1]), g_loss, ctx.backend)
        return None, None, None, None, dlogits


def _losses(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    """What sums to the loss, then the other fields of `PolicyLossOutput`."""
    return _kernel(as_rows(logits), inputs, None)


def _losses_operation(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    return tuple(policy_loss(as_rows(logits), *flattened(inputs), False)[:-1])


def _formed(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    """What `_losses` returns, then the gradient of the loss in the shape of the logits."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return *_kernel(as_rows(logits), inputs, dlogits.view(-1, logits.shape[-1])), dlogits


def _formed_operation(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    *outputs, dlogits = policy_loss(as_rows(logits), *flattened(inputs), True)
    return *outputs, dlogits.view(logits.shape)


def _formed_in_place(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    rows = logits.view(-1, logits.shape[-1])
    return *_kernel(rows, inputs, rows), logits


def _formed_in_place_operation(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    return *policy_loss_(logits.view(-1, logits.shape[-1]), *flattened(inputs)), logits


def run_policy_loss(
    logits: Tensor, inputs: LossInputs, inplace: bool = False
) -> tuple[Tensor, ...]:
    """The fields of `PolicyLossOutput` for `logits [..., V]`; `inplace`, the logits become the
    gradient of the loss, which can then be differentiated once."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        run = kernel_or_operation((logits,), _losses, _losses_operation)
        losses, *parts = run(logits, inputs)
        return losses.sum(), *parts
    kernel, operation = _formed, _formed_operation
    if inplace:
        kernel, operation = _formed_in_place, _formed_in_place_operation
    run = kernel_or_operation((logits,), kernel, operation)
    losses, *parts, dlogits = run(logits.detach(), inputs)
    loss = FormedLoss.apply(losses, (dlogits,), inputs.backend, inplace, logits)
    return (loss[0] if inplace else loss), *parts
