"""The torch operations of the linear path: schemas, fake implementations and autograd.

The counterpart of `ops.py` and `loss_ops.py` for functions of hidden states and the head's weight.
The operations take flattened rows and resolve backend and workspace when they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from papo_kernels.head.passes import HeadInputs, HeadOptions, HeadPass
from papo_kernels.head.plan import Needs
from papo_kernels.types import LossInputs, RowParams

from . import token_stats as ops
from .policy_loss import (
    LOSS_SCHEMA,
    OUTPUT_SCHEMA,
    FormedLoss,
    fake_policy_loss,
    flattened,
    scaled,
    unflattened,
)
from .token_stats import ROW_SCHEMA, fake_token_stats, refuse_double_backward, refuse_lse

HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, "
    "Tensor? keep_offsets, Tensor? keep_ids"
)
CHUNK_SCHEMA = "float lora_scaling, ScalarType logits_dtype, SymInt chunk_bytes"
# As an operation returns them: `[0]` where there is none.
GRADIENT_SCHEMA = "Tensor dhidden, Tensor dweight, Tensor dbias, Tensor dlora_a, Tensor dlora_b"


def _present(like: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def _fake_gradients(inputs: HeadInputs, needs: list[bool]) -> tuple[Tensor, ...]:
    wanted = (x if needed else None for x, needed in zip(inputs[:5], needs, strict=True))
    return _present(inputs.hidden, [None if x is None else x.new_empty(x.shape) for x in wanted])


def _is_plain(inputs: HeadInputs) -> bool:
    return all(x is None or ops.is_plain(x) for x in inputs)


# ---- linear_token_stats -------------------------------------------------------------------------


def _head_pass(arguments: Sequence[Any]) -> HeadPass:
    """Of the arguments hidden to chunk_bytes of an operation."""
    *tensors, targets, temperature, softcap, vocab_size, backend = arguments[:12]
    row = RowParams(temperature, softcap, vocab_size)
    return HeadPass(HeadInputs(*tensors), HeadOptions(row, backend, *arguments[12:]), targets)


@custom_op(
    "papo::linear_token_stats",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, Tensor targets, {ROW_SCHEMA}, {CHUNK_SCHEMA}) -> (Tensor logp, "
    "Tensor entropy, Tensor unit_polarity, Tensor lse, Tensor state)",
)
def linear_token_stats(*arguments: Any) -> tuple[Tensor, ...]:
    """logp, entropy, unit_polarity, lse `[N]` and the row state `[N, 6]` that backward needs."""
    return _head_pass(arguments).token_stats_fwd()


@linear_token_stats.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return fake_token_stats(hidden)


@custom_op(
    "papo::linear_token_stats_bwd",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, Tensor targets, {ROW_SCHEMA}, {CHUNK_SCHEMA}, Tensor state, "
    "Tensor? g_logp, Tensor? g_entropy, Tensor? g_unit_polarity, bool[] needs) -> "
    f"({GRADIENT_SCHEMA})",
)
def linear_token_stats_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients where `needs` says so, for upstream gradients `[N]`, None being zero."""
    *call, state, g_logp, g_entropy, g_unit_polarity, needs = arguments
    upstream = (g_logp, g_entropy, g_unit_polarity)
    grads = _head_pass(call).token_stats_bwd(state, upstream, Needs(*needs))
    return _present(call[0], grads)


@linear_token_stats_bwd.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(HeadInputs(*arguments[:7]), arguments[-1])


def _token_stats_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.options = *inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, output[-1])
    ctx.set_materialize_grads(False)
    # A traced graph asks for the gradient of every output, so lse cannot refuse one here.
    ctx.mark_non_differentiable(*output[3:])


def _token_stats_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    refuse_lse(grads[3])
    needs = Needs(*ctx.needs_input_grad[:5])
    others = (None,) * (len(ctx.needs_input_grad) - len(needs))
    if all(g is None for g in grads[:3]):
        return *(None for _ in needs), *others
    *tensors, targets, state = ctx.saved_tensors
    inputs = HeadInputs(*tensors)
    results: Sequence[Tensor | None]
    if _is_plain(inputs):
        results = _head_pass((*tensors, targets, *ctx.options)).token_stats_bwd(
            state, grads[:3], needs
        )
    else:
        formed = linear_token_stats_bwd(
            *inputs, targets, *ctx.options, state, *grads[:3], list(needs)
        )
        results = [g if needed else None for g, needed in zip(formed, needs, strict=True)]
    return *results, *others


linear_token_stats.register_autograd(_token_stats_backward, setup_context=_token_stats_context)


class _TokenStats(torch.autograd.Function):
    """The same autograd without the dispatcher, in which lse refuses a gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *stats, state = _head_pass(arguments).token_stats_fwd()
        ctx.save_for_backward(*arguments[:8], state)
        ctx.options = arguments[8:]
        ctx.set_materialize_grads(False)
        return tuple(stats)

    backward = staticmethod(_token_stats_backward)


def run_linear_token_stats(
    inputs: HeadInputs, options: HeadOptions, targets: Tensor
) -> tuple[Tensor, ...]:
    """`linear_token_stats`, by the shortest way: logp, entropy, unit_polarity, lse `[N]`."""
    row, *rest = options
    arguments = (*inputs, targets, *row[:3], *rest)
    if not _is_plain(inputs):
        return tuple(linear_token_stats(*arguments)[:4])
    outputs: tuple[Tensor, ...] = _TokenStats.apply(*arguments)
    return outputs


# ---- linear_policy_loss -------------------------------------------------------------------------


@custom_op(
    "papo::linear_policy_loss",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, {LOSS_SCHEMA}, {CHUNK_SCHEMA}, bool[] needs) -> ({OUTPUT_SCHEMA}, "
    f"{GRADIENT_SCHEMA})",
)
def linear_policy_loss(*arguments: Any) -> tuple[Tensor, ...]:
    """The fields of `PolicyLossOutput`, then the gradients of the loss where `needs` says so."""
    *call, lora_scaling, logits_dtype, chunk_bytes, needs = arguments
    inputs, loss = HeadInputs(*call[:7]), unflattened(call[7:])
    options = HeadOptions(loss.row, loss.backend, lora_scaling, logits_dtype, chunk_bytes)
    (token_loss, *parts), grads = HeadPass(inputs, options, loss.targets).policy_loss(
        loss, Needs(*needs)
    )
    return token_loss.sum(), *parts, *_present(inputs.hidden, grads)


@linear_policy_loss.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = HeadInputs(*arguments[:7])
    return *fake_policy_loss(inputs.hidden), *_fake_gradients(inputs, arguments[-1])


def _policy_loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[8:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    *_, ctx.backend, _, _, _, ctx.formed = inputs


def _policy_loss_backward(ctx: Any, g_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    wanted, others = ctx.needs_input_grad[:5], (None,) * (len(ctx.needs_input_grad) - 5)
    if g_loss is None:
        return *(None for _ in wanted), *others
    if any(want and not formed for want, formed in zip(wanted, ctx.formed, strict=True)):
        raise RuntimeError("papo::linear_policy_loss was called with needs=False for an input")
    saved = zip(ctx.saved_tensors, ctx.formed, strict=True)
    grads = [g if formed else None for g, formed in saved]
    return *scaled(grads, g_loss, ctx.backend), *others


linear_policy_loss.register_autograd(_policy_loss_backward, setup_context=_policy_loss_context)


def run_linear_policy_loss(
    inputs: HeadInputs, options: HeadOptions, call: LossInputs
) -> tuple[Tensor, ...]:
    """`linear_policy_loss`, by the shortest way: the fields of `PolicyLossOutput`."""
    needs = inputs.needs()
    if not _is_plain(inputs):
        _, _, *chunks = options
        outputs = linear_policy_loss(*inputs, *flattened(call), *chunks, list(needs))
        return tuple(outputs[:8])
    with torch.no_grad():
        head_pass = HeadPass(inputs, options, call.targets)
        (token_loss, *parts), grads = head_pass.policy_loss(call, needs)
    return FormedLoss.apply(token_loss, grads, call.backend, *inputs[:5]), *parts
