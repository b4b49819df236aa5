"""The policy loss as torch operations, out of place and in place: the counterpart of `ops.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .ops import (
    backend_for,
    check_target_values,
    is_plain,
    refuse_double_backward,
    run_scale_,
)
from .types import LossInputs, acc_dtype

# ---- policy_loss --------------------------------------------------------------------------------


def _run_policy_loss(
    logits: Tensor, inputs: LossInputs, dlogits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `PolicyLossOutput`; `dlogits` receives the gradient of the loss."""
    check_target_values(inputs.targets, inputs.vocab_size)
    token_loss, *parts = backend_for(inputs.backend, logits).policy_loss_fwd(
        logits, inputs.targets, *inputs.unpack(), dlogits
    )
    logp, entropy, unit_polarity, polarity, weight, ratio, clipped = parts
    return token_loss.sum(), logp, entropy, unit_polarity, polarity, weight, ratio, clipped


def _fake_policy_loss(
    logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, acc = logits.shape[0], acc_dtype(logits.dtype)
    logp, entropy, unit_polarity, polarity, weight, ratio = (
        logits.new_empty(n, dtype=acc) for _ in range(6)
    )
    clipped = logits.new_empty(n, dtype=torch.bool)
    loss = logits.new_empty((), dtype=acc)
    return loss, logp, entropy, unit_polarity, polarity, weight, ratio, clipped


def _policy_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    token_weight: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    phase: Tensor | None,
    sigma: Tensor | None,
    scale: Tensor | None,
    shape: str,
    options: list[float],
    vocab_size: int,
    backend: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `PolicyLossOutput`, then dlogits, the gradient of the loss (`[0]` if not
    needed). The arguments after `logits` are `LossInputs`."""
    inputs = LossInputs(
        targets,
        advantages,
        token_weight,
        old_logp,
        ref_logp,
        phase,
        sigma,
        scale,
        shape,
        options,
        vocab_size,
        backend,
    )
    dlogits = logits.new_empty(logits.shape if needs_grad else (0,))
    outputs = _run_policy_loss(logits, inputs, dlogits if needs_grad else None)
    return *outputs, dlogits


policy_loss = custom_op("papo::policy_loss", _policy_loss, mutates_args=())


@policy_loss.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs_grad = rest[-1]
    return *_fake_policy_loss(logits), logits.new_empty(logits.shape if needs_grad else (0,))


def _policy_loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *rest, dlogits = output
    ctx.save_for_backward(dlogits)
    ctx.mark_non_differentiable(*rest, dlogits)
    ctx.set_materialize_grads(False)
    ctx.backend, ctx.needs_grad, ctx.n_inputs = inputs[-2], inputs[-1], len(inputs)


def _policy_loss_backward(ctx: Any, g_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    others = (None,) * (ctx.n_inputs - 1)
    if g_loss is None:
        return None, *others
    if not ctx.needs_grad:
        raise RuntimeError("papo::policy_loss was called with needs_grad=False")
    (dlogits,) = ctx.saved_tensors
    # A graph that is kept may come back for the unscaled gradient, and a traced one must not write
    # to what its forward part returns; otherwise this is the buffer's last use.
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    if kept or not is_plain(dlogits):
        dlogits = dlogits.clone()
    run_scale_(dlogits, g_loss, ctx.backend)
    return dlogits, *others


policy_loss.register_autograd(_policy_loss_backward, setup_context=_policy_loss_context)


class _PolicyLoss(torch.autograd.Function):
    """The same autograd without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
        dlogits = logits.new_empty(logits.shape)
        outputs = _run_policy_loss(logits, inputs, dlogits)
        ctx.save_for_backward(dlogits)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.needs_grad, ctx.n_inputs = inputs.backend, True, 2
        return outputs

    backward = staticmethod(_policy_loss_backward)


def run_policy_loss(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    """`policy_loss`, by the shortest way: the fields of `PolicyLossOutput`."""
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if not is_plain(logits):
        return tuple(policy_loss(logits, *inputs, needs_grad)[:-1])
    if needs_grad:
        outputs: tuple[Tensor, ...] = _PolicyLoss.apply(logits, inputs)
        return outputs
    return _run_policy_loss(logits, inputs, None)


# ---- policy_loss in place -----------------------------------------------------------------------


@custom_op("papo::policy_loss_", mutates_args=("logits",))
def policy_loss_(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    token_weight: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    phase: Tensor | None,
    sigma: Tensor | None,
    scale: Tensor | None,
    shape: str,
    options: list[float],
    vocab_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `PolicyLossOutput`; the logits become the gradient of the loss."""
    inputs = LossInputs(
        targets,
        advantages,
        token_weight,
        old_logp,
        ref_logp,
        phase,
        sigma,
        scale,
        shape,
        options,
        vocab_size,
        backend,
    )
    return _run_policy_loss(logits, inputs, logits)


@policy_loss_.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_policy_loss(logits)


class _PolicyLossInPlace(torch.autograd.Function):
    """Autograd of `policy_loss_`, as of any in-place operation: the logits become its output.

    So a later use of the logits brings a gradient to that output, which is refused, and a saved
    copy made earlier fails autograd's own version check.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
        rows = logits.detach().view(-1, logits.shape[-1])
        if is_plain(logits):
            outputs = _run_policy_loss(rows, inputs, rows)
        else:
            outputs = policy_loss_(rows, *inputs)
        ctx.mark_dirty(logits)
        ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.spent = inputs.backend, False
        return logits, *outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        refuse_double_backward()
        g_logits, g_loss = grads[:2]
        if g_logits is not None:
            raise RuntimeError(
                "policy_loss(inplace=True) overwrote the logits with their gradient, but another "
                "part of the loss uses them too; pass inplace=False"
            )
        if g_loss is None:
            return None, None
        if ctx.spent:
            raise RuntimeError(
                "policy_loss(inplace=True) can be differentiated once: its gradient buffer was "
                "handed on; pass inplace=False to go backward a second time"
            )
        (dlogits,) = ctx.saved_tensors
        ctx.spent = True
        dlogits = dlogits.detach()
        run_scale_(dlogits.view(-1, dlogits.shape[-1]), g_loss, ctx.backend)
        return dlogits, None


def policy_loss_in_place(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    """`policy_loss_` on `logits [..., V]`, differentiable once."""
    _, *outputs = _PolicyLossInPlace.apply(logits, inputs)
    return tuple(outputs)
