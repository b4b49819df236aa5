"""The torch operations: schemas, fake implementations and autograd, one of each per operation.

Nothing else registers with torch. The operations take flattened rows (``functional.py`` flattens)
and resolve the backend when they run, so a compiled graph does not depend on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import _native
from . import backend as backends
from .types import IGNORE_INDEX, STATE_SIZE, LossInputs, RowParams, acc_dtype


def backend_for(requested: str, logits: Tensor) -> Any:
    return backends.module(backends.choose(requested or None, logits.device, logits.dtype))


def check_target_values(targets: Tensor, vocab_size: int) -> None:
    """On a CPU a bad target raises before anything runs; GPU kernels guard their reads instead."""
    if targets.device.type != "cpu":
        return
    native = _native.loaded()
    if native is not None:
        at = native.first_bad_target(targets.data_ptr(), targets.numel(), vocab_size)
    else:
        bad = ((targets < 0) | (targets >= vocab_size)) & (targets != IGNORE_INDEX)
        at = int(bad.nonzero()[0]) if bad.any() else -1
    if at >= 0:
        raise ValueError(
            f"targets: expected values in [0, {vocab_size}) or {IGNORE_INDEX} (ignored), got "
            f"{int(targets[at])} at flat position {at}"
        )


def is_plain(tensor: Tensor) -> bool:
    """Whether a call on `tensor` may go to its kernel directly: nothing traces or intercepts it.

    torch's dispatcher spends more time in Python than a small kernel takes. Graphs, fake tensors,
    subclasses and dispatch modes need it.
    """
    return (
        type(tensor) in _PLAIN_TYPES
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "papo_kernels: the backward pass is not differentiable; "
            "call backward() or autograd.grad() without create_graph=True"
        )


def refuse_lse(g_lse: Tensor | None) -> None:
    if g_lse is not None:
        raise RuntimeError(
            "papo_kernels: TokenStats.lse is not differentiable; detach() it where it enters a loss"
        )


# ---- token_stats --------------------------------------------------------------------------------


def _token_stats(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, unit_polarity, lse `[N]` and the row state `[N, 6]` that backward needs."""
    check_target_values(targets, vocab_size)
    row = RowParams(temperature, softcap, vocab_size)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    outputs = backend_for(backend, logits).token_stats_fwd(logits, targets, row)
    return outputs


token_stats = custom_op("papo::token_stats", _token_stats, mutates_args=())


@token_stats.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, acc = logits.shape[0], acc_dtype(logits.dtype)
    logp, entropy, unit_polarity, lse = (logits.new_empty(n, dtype=acc) for _ in range(4))
    return logp, entropy, unit_polarity, lse, logits.new_empty((n, STATE_SIZE), dtype=torch.float64)


def _token_stats_bwd(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    g_unit_polarity: Tensor | None,
    temperature: float,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> Tensor:
    """dlogits `[N, V]` for upstream gradients `[N]`, None being zero."""
    upstream = tuple(
        None if g is None else g.to(acc_dtype(logits.dtype)).contiguous()
        for g in (g_logp, g_entropy, g_unit_polarity)
    )
    row = RowParams(temperature, softcap, vocab_size)
    dlogits: Tensor
    dlogits = backend_for(backend, logits).token_stats_bwd(logits, targets, state, upstream, row)
    return dlogits


token_stats_bwd = custom_op("papo::token_stats_bwd", _token_stats_bwd, mutates_args=())


@token_stats_bwd.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    g_unit_polarity: Tensor | None,
    temperature: float,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _token_stats_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, *ctx.options = inputs
    state = output[-1]
    ctx.save_for_backward(logits, targets, state)
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _token_stats_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    refuse_lse(grads[3])
    dlogits = None
    if any(g is not None for g in grads[:3]):
        logits, targets, state = ctx.saved_tensors
        run: Any = _token_stats_bwd if is_plain(logits) else token_stats_bwd
        dlogits = run(logits, targets, state, *grads[:3], *ctx.options)
    return dlogits, None, None, None, None, None


def _token_stats_op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _token_stats_context(ctx, inputs, output)
    # A traced graph asks for the gradient of every output, so lse cannot refuse one there.
    ctx.mark_non_differentiable(*output[3:])


token_stats.register_autograd(_token_stats_backward, setup_context=_token_stats_op_context)


class _TokenStats(torch.autograd.Function):
    """The same autograd without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _token_stats(*inputs)
        _token_stats_context(ctx, inputs, output)
        return output

    backward = staticmethod(_token_stats_backward)


def run_token_stats(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`token_stats`, by the shortest way."""
    if not is_plain(logits):
        return token_stats(logits, *rest)
    if torch.is_grad_enabled() and logits.requires_grad:
        outputs: tuple[Tensor, ...] = _TokenStats.apply(logits, *rest)
        return outputs
    return _token_stats(logits, *rest)


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


def _scale_(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    """`dlogits [N, V] *= factor` (0-dim); free where the factor is 1."""
    backend_for(backend, dlogits).scale_(dlogits, factor)


scale_ = custom_op("papo::scale_", _scale_, mutates_args=("dlogits",))


@scale_.register_fake
def _(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    return None


def run_scale_(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    """`scale_`, by the shortest way."""
    (_scale_ if is_plain(dlogits) else scale_)(dlogits, factor, backend)


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
