"""The policy loss as torch operations, out of place and in place: the counterpart of `ops.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from papo_kernels.types import (
    LossInputs,
    PolicyLossParams,
    RowParams,
    TokenInputs,
    WeightingInputs,
    acc_dtype,
)

from . import token_stats as ops
from .token_stats import as_rows, backend_for, check_target_values, refuse_double_backward

# ---- what the operations of a loss share ---------------------------------------------------------

# `LossInputs`, flat. The weighting applies where phase, sigma and scale are given.
LOSS_SCHEMA = (
    "Tensor targets, Tensor advantages, Tensor token_weight, Tensor? old_logp, Tensor? ref_logp, "
    "Tensor? phase, Tensor? sigma, Tensor? scale, str shape, float[] options, SymInt vocab_size, "
    "str backend"
)
# The fields of `PolicyLossOutput`.
OUTPUT_SCHEMA = (
    "Tensor loss, Tensor logp, Tensor entropy, Tensor unit_polarity, Tensor polarity, "
    "Tensor weight, Tensor ratio, Tensor clipped"
)


def flattened(inputs: LossInputs) -> tuple[Any, ...]:
    """The arguments of `LOSS_SCHEMA`."""
    targets, tokens, params, weighting, row, backend = inputs
    scalars: tuple[Tensor | None, ...] = (None, None, None)
    shape, strength, dead_zone = "sign", 0.0, 0.0
    if weighting is not None:
        scalars = (weighting.phase, weighting.sigma, weighting.scale)
        shape, strength, dead_zone = weighting.shape, weighting.strength, weighting.dead_zone
    options = [
        row.temperature,
        row.softcap,
        params.clip_low,
        params.clip_high,
        params.dual_clip or 0.0,
        params.kl_coef,
        params.entropy_coef,
        strength,
        dead_zone,
    ]
    return targets, *tokens, *scalars, shape, options, row.vocab_size, backend


def unflattened(arguments: Sequence[Any]) -> LossInputs:
    """The inverse of `flattened`."""
    targets, *tokens, phase, sigma, scale, shape, options, vocab_size, backend = arguments
    temperature, softcap, clip_low, clip_high, dual_clip, kl_coef, entropy_coef, *rest = options
    strength, dead_zone = rest
    weighting = None
    if phase is not None:
        weighting = WeightingInputs(strength, phase, shape, sigma, scale, dead_zone)
    return LossInputs(
        targets,
        TokenInputs(*tokens),
        PolicyLossParams(clip_low, clip_high, dual_clip or None, kl_coef, entropy_coef),
        weighting,
        RowParams(temperature, softcap, vocab_size),
        backend,
    )


def fake_policy_loss(like: Tensor) -> tuple[Tensor, ...]:
    n, acc = like.shape[0], acc_dtype(like.dtype)
    parts = (like.new_empty(n, dtype=acc) for _ in range(6))
    return like.new_empty((), dtype=acc), *parts, like.new_empty(n, dtype=torch.bool)


def scaled(grads: Sequence[Tensor | None], factor: Tensor, backend: str) -> list[Tensor | None]:
    """Gradients formed in the forward pass times the upstream scalar, in place where this is their
    last use: a graph that is kept may come back for them, and a traced one must not write to what
    its forward part returns."""
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    results: list[Tensor | None] = []
    for grad in grads:
        if grad is not None:
            # A tensor of its own lets the leaf take the memory over instead of copying it.
            grad = grad.clone() if kept or not ops.is_plain(grad) else grad.detach()
            rows = grad[None] if grad.dim() == 1 else grad.flatten(0, -2)
            ops.run_scale_(rows, factor, backend)
        results.append(grad)
    return results


class FormedLoss(torch.autograd.Function):
    """The sum of token losses whose gradients were formed along with them.

    Args:
        token_loss: `[N]`.
        grads: of the sum, one for each of `inputs`; None where that needs none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        token_loss: Tensor,
        grads: tuple[Tensor | None, ...],
        backend: str,
        *inputs: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*grads)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        return token_loss.sum()

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if g_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, None, None, *scaled(ctx.saved_tensors, g_loss, ctx.backend)


# ---- policy_loss --------------------------------------------------------------------------------


def _token_losses(logits: Tensor, inputs: LossInputs, dlogits: Tensor | None) -> tuple[Tensor, ...]:
    """What `policy_loss_fwd` of a backend returns; `dlogits` receives the gradient of the loss."""
    check_target_values(inputs.targets, inputs.row.vocab_size)
    targets, tokens, params, weighting, row, backend = inputs
    outputs: tuple[Tensor, ...] = backend_for(backend, logits).policy_loss_fwd(
        logits, targets, tokens, params, weighting, row, dlogits
    )
    return outputs


@custom_op(
    "papo::policy_loss",
    mutates_args=(),
    schema=f"(Tensor logits, {LOSS_SCHEMA}, bool needs_grad) -> ({OUTPUT_SCHEMA}, Tensor dlogits)",
)
def policy_loss(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The fields of `PolicyLossOutput`, then the gradient of the loss (`[0]` if not needed)."""
    *arguments, needs_grad = rest
    dlogits = logits.new_empty(logits.shape if needs_grad else (0,))
    token_loss, *parts = _token_losses(
        logits, unflattened(arguments), dlogits if needs_grad else None
    )
    return token_loss.sum(), *parts, dlogits


@policy_loss.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs_grad = rest[-1]
    return *fake_policy_loss(logits), logits.new_empty(logits.shape if needs_grad else (0,))


def _policy_loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    *_, ctx.backend, ctx.needs_grad = inputs
    ctx.nothing = (None,) * (len(inputs) - 1)


def _policy_loss_backward(ctx: Any, g_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    if g_loss is None:
        return None, *ctx.nothing
    if not ctx.needs_grad:
        raise RuntimeError("papo::policy_loss was called with needs_grad=False")
    return *scaled(ctx.saved_tensors, g_loss, ctx.backend), *ctx.nothing


policy_loss.register_autograd(_policy_loss_backward, setup_context=_policy_loss_context)


def run_policy_loss(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    """`policy_loss` of `logits [..., V]`, by the shortest way: the fields of `PolicyLossOutput`."""
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if not ops.is_plain(logits):
        return tuple(policy_loss(as_rows(logits), *flattened(inputs), needs_grad)[:-1])
    rows = as_rows(logits.detach())
    if not needs_grad:
        token_loss, *parts = _token_losses(rows, inputs, None)
        return token_loss.sum(), *parts
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    token_loss, *parts = _token_losses(rows, inputs, dlogits.view(-1, dlogits.shape[-1]))
    return FormedLoss.apply(token_loss, (dlogits,), inputs.backend, logits), *parts


# ---- policy_loss in place -----------------------------------------------------------------------


@custom_op(
    "papo::policy_loss_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {LOSS_SCHEMA}) -> ({OUTPUT_SCHEMA})",
)
def policy_loss_(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The fields of `PolicyLossOutput`; the logits become the gradient of the loss."""
    token_loss, *parts = _token_losses(logits, unflattened(arguments), logits)
    return token_loss.sum(), *parts


@policy_loss_.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return fake_policy_loss(logits)


class _PolicyLossInPlace(torch.autograd.Function):
    """Autograd of `policy_loss_`, as of any in-place operation: the logits become its output.

    So a later use of the logits brings a gradient to that output, which is refused, and a saved
    copy made earlier fails autograd's own version check.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
        rows = logits.detach().view(-1, logits.shape[-1])
        if ops.is_plain(logits):
            token_loss, *parts = _token_losses(rows, inputs, rows)
            outputs = (token_loss.sum(), *parts)
        else:
            outputs = policy_loss_(rows, *flattened(inputs))
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
        ops.run_scale_(dlogits.view(-1, dlogits.shape[-1]), g_loss, ctx.backend)
        return dlogits, None


def policy_loss_in_place(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    """`policy_loss_` on `logits [..., V]`, differentiable once."""
    _, *outputs = _PolicyLossInPlace.apply(logits, inputs)
    return tuple(outputs)
