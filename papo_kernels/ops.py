"""The torch operations: schemas, fake implementations and autograd, one of each per operation.

Nothing else registers with torch. The operations take flattened rows (``functional.py`` flattens)
and resolve the backend when they run, so a compiled graph does not depend on it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from . import backend as backends
from .types import (
    IGNORE_INDEX,
    STATE_SIZE,
    PolicyLossParams,
    RowParams,
    TokenInputs,
    WeightingInputs,
    acc_dtype,
)


class LossOptions(NamedTuple):
    """The numbers of a policy-loss call, as the schema's `options`. `dual_clip` 0.0 means none."""

    temperature: float
    softcap: float
    clip_low: float
    clip_high: float
    dual_clip: float
    kl_coef: float
    entropy_coef: float
    strength: float
    dead_zone: float


def _backend(requested: str, logits: Tensor) -> Any:
    return backends.module(backends.choose(requested or None, logits.device, logits.dtype))


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    """On a CPU a bad target raises before anything runs; GPU kernels guard their reads instead."""
    if targets.device.type != "cpu":
        return
    bad = ((targets < 0) | (targets >= vocab_size)) & (targets != IGNORE_INDEX)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"targets: expected values in [0, {vocab_size}) or {IGNORE_INDEX} (ignored), got "
            f"{int(targets[at])} at flat position {at}"
        )


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "papo_kernels: the backward pass is not differentiable; "
            "call backward() or autograd.grad() without create_graph=True"
        )


# ---- token_stats --------------------------------------------------------------------------------


@custom_op("papo::token_stats", mutates_args=())
def token_stats(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, unit_polarity, lse `[N]` and the row state `[N, 6]` that backward needs."""
    _check_targets(targets, vocab_size)
    row = RowParams(temperature, softcap, vocab_size)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    outputs = _backend(backend, logits).token_stats_fwd(logits, targets, row)
    return outputs


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


@custom_op("papo::token_stats_bwd", mutates_args=())
def token_stats_bwd(
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
    dlogits = _backend(backend, logits).token_stats_bwd(logits, targets, state, upstream, row)
    return dlogits


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
    *_, lse, state = output
    ctx.save_for_backward(logits, targets, state)
    ctx.mark_non_differentiable(lse, state)
    ctx.set_materialize_grads(False)


def _token_stats_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_double_backward()
    dlogits = None
    if any(g is not None for g in grads[:3]):
        logits, targets, state = ctx.saved_tensors
        dlogits = token_stats_bwd(logits, targets, state, *grads[:3], *ctx.options)
    return dlogits, None, None, None, None, None


token_stats.register_autograd(_token_stats_backward, setup_context=_token_stats_context)


class _NotDifferentiable(torch.autograd.Function):
    """The identity on `value`, whose use in a loss raises instead of giving no gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, logits: Tensor, name: str) -> Tensor:
        ctx.name = name
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"papo_kernels: {ctx.name} is not differentiable; detach() it where it enters a loss"
        )


def not_differentiable(value: Tensor, logits: Tensor, name: str) -> Tensor:
    """`value`, computed from `logits`, refusing gradients loudly (silently detached in a graph that
    torch.compile traces, which asks for the gradient of every output)."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        return value
    refusing: Tensor = _NotDifferentiable.apply(value, logits, name)
    return refusing


# ---- policy_loss --------------------------------------------------------------------------------


class LossInputs(NamedTuple):
    """What both policy-loss operations take after the logits, in the order of their schemas.

    The weighting applies where phase, sigma and scale are given; `options` is a `LossOptions`.
    """

    targets: Tensor
    advantages: Tensor
    token_weight: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    phase: Tensor | None
    sigma: Tensor | None
    scale: Tensor | None
    shape: str
    options: list[float]
    vocab_size: int
    backend: str


def _run_policy_loss(
    logits: Tensor, inputs: LossInputs, dlogits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `PolicyLossOutput`; `dlogits` receives the gradient of the loss."""
    _check_targets(inputs.targets, inputs.vocab_size)
    numbers = LossOptions(*inputs.options)
    params = PolicyLossParams(
        numbers.clip_low,
        numbers.clip_high,
        numbers.dual_clip or None,
        numbers.kl_coef,
        numbers.entropy_coef,
    )
    weighting = None
    if inputs.phase is not None and inputs.sigma is not None and inputs.scale is not None:
        scalars = (inputs.phase, inputs.shape, inputs.sigma, inputs.scale)
        weighting = WeightingInputs(numbers.strength, *scalars, numbers.dead_zone)
    token_loss, *parts = _backend(inputs.backend, logits).policy_loss_fwd(
        logits,
        inputs.targets,
        TokenInputs(inputs.advantages, inputs.token_weight, inputs.old_logp, inputs.ref_logp),
        params,
        weighting,
        RowParams(numbers.temperature, numbers.softcap, inputs.vocab_size),
        dlogits,
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


@custom_op("papo::scale_", mutates_args=("dlogits",))
def scale_(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    """`dlogits [N, V] *= factor` (0-dim); free where the factor is 1."""
    _backend(backend, dlogits).scale_(dlogits, factor)


@scale_.register_fake
def _(dlogits: Tensor, factor: Tensor, backend: str) -> None:
    return None


@custom_op("papo::policy_loss", mutates_args=())
def policy_loss(
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
    _refuse_double_backward()
    others = (None,) * (ctx.n_inputs - 1)
    if g_loss is None:
        return None, *others
    if not ctx.needs_grad:
        raise RuntimeError("papo::policy_loss was called with needs_grad=False")
    (dlogits,) = ctx.saved_tensors
    # A graph that is kept may come back for the unscaled gradient; otherwise this is its last use.
    if torch._C._autograd._get_current_graph_task_keep_graph():
        dlogits = dlogits.clone()
    scale_(dlogits, g_loss, ctx.backend)
    return dlogits, *others


policy_loss.register_autograd(_policy_loss_backward, setup_context=_policy_loss_context)


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
        outputs = policy_loss_(logits.detach().view(-1, logits.shape[-1]), *inputs)
        ctx.mark_dirty(logits)
        ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.spent = inputs.backend, False
        return logits, *outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        _refuse_double_backward()
        g_logits, g_loss = grads[:2]
        if g_logits is not None:
            raise RuntimeError(
                "policy_loss(inplace=True) overwrote the logits with their gradient, but another "
                "part of the loss uses them too; pass inplace=False"
            )
        if g_loss is None:
            return None, None
        (dlogits,) = ctx.saved_tensors
        if ctx.spent:
            raise RuntimeError(
                "policy_loss(inplace=True) can be differentiated once: its gradient buffer was "
                "handed on; pass inplace=False to go backward a second time"
            )
        ctx.spent = True
        dlogits = dlogits.detach()
        scale_(dlogits.view(-1, dlogits.shape[-1]), g_loss, ctx.backend)
        return dlogits, None


def policy_loss_in_place(logits: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
    """`policy_loss_` on `logits [..., V]`, differentiable once."""
    _, *outputs = _PolicyLossInPlace.apply(logits, inputs)
    return tuple(outputs)
