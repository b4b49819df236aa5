"""The torch operations of the linear path: schemas, fake implementations and autograd.

The counterpart of `ops.py` for functions of hidden states and the head's weight. The operations
take flattened rows and resolve backend and workspace when they run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .linear_chunks import Needs
from .linear_passes import HeadInputs, HeadOptions, HeadPass
from .ops import is_plain, refuse_double_backward, refuse_lse, run_scale_
from .types import STATE_SIZE, LossInputs, acc_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _present(like: Tensor, grads: tuple[Tensor | None, ...]) -> Gradients:
    """Gradients as an operation returns them: `[0]` where there is none."""
    hidden, weight, bias, lora_a, lora_b = (like.new_empty(0) if g is None else g for g in grads)
    return hidden, weight, bias, lora_a, lora_b


def _fake_gradients(inputs: HeadInputs, needs: list[bool]) -> Gradients:
    grads = [
        x.new_empty(x.shape) if x is not None and needed else inputs.hidden.new_empty(0)
        for x, needed in zip(inputs[:5], needs, strict=True)
    ]
    hidden, weight, bias, lora_a, lora_b = grads
    return hidden, weight, bias, lora_a, lora_b


# ---- linear_token_stats -------------------------------------------------------------------------


@custom_op("papo::linear_token_stats", mutates_args=())
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    keep_offsets: Tensor | None,
    keep_ids: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float,
    lora_scaling: float,
    vocab_size: int,
    logits_dtype: torch.dtype,
    chunk_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, unit_polarity, lse `[N]` and the row state `[N, 6]` that backward needs."""
    inputs = HeadInputs(hidden, weight, bias, lora_a, lora_b, keep_offsets, keep_ids)
    options = HeadOptions(
        temperature, softcap, lora_scaling, vocab_size, logits_dtype, chunk_bytes, backend
    )
    return HeadPass(inputs, options, targets).token_stats_fwd()


@linear_token_stats.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, acc = hidden.shape[0], acc_dtype(hidden.dtype)
    logp, entropy, unit_polarity, lse = (hidden.new_empty(n, dtype=acc) for _ in range(4))
    return logp, entropy, unit_polarity, lse, hidden.new_empty((n, STATE_SIZE), dtype=torch.float64)


@custom_op("papo::linear_token_stats_bwd", mutates_args=())
def linear_token_stats_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    keep_offsets: Tensor | None,
    keep_ids: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float,
    lora_scaling: float,
    vocab_size: int,
    logits_dtype: torch.dtype,
    chunk_bytes: int,
    backend: str,
    state: Tensor,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    g_unit_polarity: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias, lora_a, lora_b (`[0]` where `needs` says no) for upstream
    gradients `[N]`, None being zero."""
    inputs = HeadInputs(hidden, weight, bias, lora_a, lora_b, keep_offsets, keep_ids)
    options = HeadOptions(
        temperature, softcap, lora_scaling, vocab_size, logits_dtype, chunk_bytes, backend
    )
    upstream = (g_logp, g_entropy, g_unit_polarity)
    head_pass = HeadPass(inputs, options, targets)
    return _present(hidden, head_pass.token_stats_bwd(state, upstream, Needs(*needs)))


@linear_token_stats_bwd.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _fake_gradients(HeadInputs(*args[:7]), args[-1])


def _token_stats_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, output[-1])
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)


def _token_stats_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    refuse_lse(grads[3])
    needs = list(ctx.needs_input_grad[:5])
    others = (None,) * (3 + len(ctx.options))
    if all(g is None for g in grads[:3]):
        return *(None,) * 5, *others
    *tensors, state = ctx.saved_tensors
    results = linear_token_stats_bwd(*tensors, *ctx.options, state, *grads[:3], needs)
    return *(g if needed else None for g, needed in zip(results, needs, strict=True)), *others


def _token_stats_op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _token_stats_context(ctx, inputs, output)
    # A traced graph asks for the gradient of every output, so lse cannot refuse one there.
    ctx.mark_non_differentiable(*output[3:])


linear_token_stats.register_autograd(_token_stats_backward, setup_context=_token_stats_op_context)


class _TokenStats(torch.autograd.Function):
    """The same autograd, in which lse refuses a gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = linear_token_stats(*inputs)
        _token_stats_context(ctx, inputs, output)
        return output

    backward = staticmethod(_token_stats_backward)


def run_linear_token_stats(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`linear_token_stats`, refusing a gradient of lse where nothing traces the call."""
    if not is_plain(hidden):
        return linear_token_stats(hidden, *rest)
    outputs: tuple[Tensor, ...] = _TokenStats.apply(hidden, *rest)
    return outputs


# ---- linear_policy_loss -------------------------------------------------------------------------


@custom_op("papo::linear_policy_loss", mutates_args=())
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    keep_offsets: Tensor | None,
    keep_ids: Tensor | None,
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
    lora_scaling: float,
    logits_dtype: torch.dtype,
    chunk_bytes: int,
    needs: list[bool],
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """The fields of `PolicyLossOutput`, then the gradients of the loss with respect to hidden,
    weight, bias, lora_a and lora_b (`[0]` where `needs` says no).

    `targets` to `backend` are `LossInputs`.
    """
    inputs = HeadInputs(hidden, weight, bias, lora_a, lora_b, keep_offsets, keep_ids)
    loss_inputs = LossInputs(
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
    row = loss_inputs.unpack()[-1]
    head_options = HeadOptions(
        row.temperature, row.softcap, lora_scaling, vocab_size, logits_dtype, chunk_bytes, backend
    )
    head_pass = HeadPass(inputs, head_options, targets)
    outputs, grads = head_pass.policy_loss(loss_inputs, Needs(*needs))
    loss, logp, entropy, unit_polarity, polarity, weights, ratio, clipped = outputs
    return (
        loss, logp, entropy, unit_polarity, polarity, weights, ratio, clipped,
        *_present(hidden, grads),
    )  # fmt: skip


@linear_policy_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs = HeadInputs(*args[:7])
    n, acc = inputs.hidden.shape[0], acc_dtype(inputs.hidden.dtype)
    loss = inputs.hidden.new_empty((), dtype=acc)
    parts = [inputs.hidden.new_empty(n, dtype=acc) for _ in range(6)]
    clipped = inputs.hidden.new_empty(n, dtype=torch.bool)
    return loss, *parts, clipped, *_fake_gradients(inputs, args[-1])


def _policy_loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[8:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.backend, ctx.needs, ctx.n_inputs = inputs[18], inputs[-1], len(inputs)


def _policy_loss_backward(ctx: Any, g_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    others = (None,) * (ctx.n_inputs - 5)
    if g_loss is None:
        return *(None,) * 5, *others
    wanted = ctx.needs_input_grad[:5]
    if any(want and not formed for want, formed in zip(wanted, ctx.needs, strict=True)):
        raise RuntimeError("papo::linear_policy_loss was called with needs=False for an input")
    return *scaled(ctx.saved_tensors, ctx.needs, g_loss, ctx.backend), *others


def scaled(
    grads: tuple[Tensor, ...], needs: list[bool], factor: Tensor, backend: str
) -> list[Tensor | None]:
    """The gradients formed in the forward pass times the upstream scalar, in place where this is
    their last use: a graph that is kept may come back for them, and a traced one must not write to
    what its forward part returns."""
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    results: list[Tensor | None] = []
    for grad, needed in zip(grads, needs, strict=True):
        if not needed:
            results.append(None)
            continue
        # A tensor of its own lets the leaf take the memory over instead of copying it.
        grad = grad.clone() if kept or not is_plain(grad) else grad.detach()
        run_scale_(grad if grad.dim() == 2 else grad[None], factor, backend)
        results.append(grad)
    return results


linear_policy_loss.register_autograd(_policy_loss_backward, setup_context=_policy_loss_context)
