"""Statistics and policy loss of a head's logits as torch operations, and their autograd.

The operations take flattened rows and resolve backend and workspace when they run. A head whose
rows are spread over ranks talks to the other ranks, which no operation does: there the passes are
called directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from papo_kernels.dispatch import kernel_or_operation
from papo_kernels.head.checks import check_gathered
from papo_kernels.head.passes import Operands, Passes, PassOptions
from papo_kernels.head.plan import Needs
from papo_kernels.head.split import Split
from papo_kernels.types import LossInputs

from .common import refuse_double_backward
from .policy_loss import OUTPUT_SCHEMA, FormedLoss, fake_policy_loss
from .schema import LOSS_SCHEMA, ROW_SCHEMA, flattened, flattened_row, unflattened, unflattened_row
from .token_stats import fake_token_stats

OPERAND_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, "
    "Tensor? keep_offsets, Tensor? keep_ids"
)
CHUNK_SCHEMA = "float lora_scaling, ScalarType logits_dtype, SymInt chunk_bytes"
# As an operation returns them: `[0]` where there is none.
GRADIENT_SCHEMA = "Tensor dhidden, Tensor dweight, Tensor dbias, Tensor dlora_a, Tensor dlora_b"


class HeadCall(NamedTuple):
    """The arguments of a call that are not differentiated: its options, and the split of the
    vocabulary, None where one rank holds it all."""

    options: PassOptions
    split: Split | None

    def passes(self, operands: Operands, targets: Tensor, checked: bool = False) -> Passes:
        return Passes(operands, self.options, targets, self.split, checked)

    def way(
        self,
        tensors: Sequence[Tensor | None],
        kernel: Callable[..., Any],
        operation: Callable[..., Any],
    ) -> Callable[..., Any]:
        """The kernel, or the operation where something intercepts the call."""
        return kernel if self.split else kernel_or_operation(tensors, kernel, operation)

    def summed(self, grads: tuple[Tensor | None, ...], dtype: torch.dtype) -> Sequence[Any]:
        """The gradients of whole heads from what this rank formed; a collective."""
        return grads if self.split is None else self.split.reduce(grads, dtype)


def _flat(options: PassOptions) -> tuple[Any, ...]:
    row, backend, *chunks = options
    return *flattened_row(row, backend), *chunks


def _present(like: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def _wanted(grads: Sequence[Tensor], needs: Needs) -> list[Tensor | None]:
    """The inverse of `_present`."""
    return [g if needed else None for g, needed in zip(grads, needs, strict=True)]


def _fake_gradients(operands: Operands, needs: list[bool]) -> tuple[Tensor, ...]:
    wanted = (x if needed else None for x, needed in zip(operands[:5], needs, strict=True))
    return _present(operands.hidden, [None if x is None else x.new_empty(x.shape) for x in wanted])


# ---- token_stats --------------------------------------------------------------------------------


def _unflattened(arguments: Sequence[Any]) -> tuple[Operands, HeadCall, Tensor]:
    """Operands, call and targets from an operation's arguments, `hidden` to `chunk_bytes`."""
    options = PassOptions(*unflattened_row(arguments[8:12]), *arguments[12:])
    return Operands(*arguments[:7]), HeadCall(options, None), arguments[7]


def _stats(operands: Operands, call: HeadCall, targets: Tensor, full: bool) -> tuple[Tensor, ...]:
    return call.passes(operands, targets).token_stats_fwd(full)


@custom_op(
    "papo::linear_token_stats",
    mutates_args=(),
    schema=f"({OPERAND_SCHEMA}, Tensor targets, {ROW_SCHEMA}, {CHUNK_SCHEMA}, bool full) -> "
    "(Tensor logp, Tensor entropy, Tensor unit_polarity, Tensor lse, Tensor state, Tensor sums)",
)
def linear_token_stats(*arguments: Any) -> tuple[Tensor, ...]:
    """What `Passes.token_stats_fwd` returns."""
    return _stats(*_unflattened(arguments[:-1]), arguments[-1])


@linear_token_stats.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, targets, full = arguments[0], arguments[7], arguments[-1]
    sums = hidden.new_empty(hidden.shape[0] if full else 0, dtype=torch.float64)
    return *fake_token_stats(hidden, targets), sums


def _stats_operation(
    operands: Operands, call: HeadCall, targets: Tensor, full: bool
) -> tuple[Tensor, ...]:
    return tuple(linear_token_stats(*operands, targets, *_flat(call.options), full))


Upstream = tuple[Tensor | None, ...]


def _stats_bwd(
    operands: Operands,
    call: HeadCall,
    targets: Tensor,
    state: Tensor,
    grads: Upstream,
    needs: Needs,
) -> Sequence[Tensor | None]:
    check_gathered(operands.weight, shard=call.split is not None)
    passes = call.passes(operands, targets, checked=True)
    return call.summed(passes.token_stats_bwd(state, grads, needs), operands.hidden.dtype)


@custom_op(
    "papo::linear_token_stats_bwd",
    mutates_args=(),
    schema=f"({OPERAND_SCHEMA}, Tensor targets, {ROW_SCHEMA}, {CHUNK_SCHEMA}, Tensor state, "
    "Tensor? g_logp, Tensor? g_entropy, Tensor? g_unit_polarity, Tensor? g_lse, bool[] needs) -> "
    f"({GRADIENT_SCHEMA})",
)
def linear_token_stats_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients where `needs` says so, for upstream gradients, None being zero."""
    *flat, state, g_logp, g_entropy, g_unit_polarity, g_lse, needs = arguments
    upstream = (g_logp, g_entropy, g_unit_polarity, g_lse)
    grads = _stats_bwd(*_unflattened(flat), state, upstream, Needs(*needs))
    return _present(flat[0], grads)


@linear_token_stats_bwd.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(Operands(*arguments[:7]), arguments[-1])


def _stats_bwd_operation(
    operands: Operands,
    call: HeadCall,
    targets: Tensor,
    state: Tensor,
    grads: Upstream,
    needs: Needs,
) -> Sequence[Tensor | None]:
    flat = (*operands, targets, *_flat(call.options))
    return _wanted(linear_token_stats_bwd(*flat, state, *grads, list(needs)), needs)


class _TokenStats(torch.autograd.Function):
    """logp, entropy, unit_polarity and lse, and if `full` the states and the sums of rows; backward
    computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, call: HeadCall, targets: Tensor, full: bool, *tensors: Any
    ) -> tuple[Tensor, ...]:
        operands = Operands(*tensors)
        run = call.way(operands, _stats, _stats_operation)
        outputs = run(operands, call, targets, full)
        # The temperatures too: autograd then sees whether they were overwritten.
        ctx.save_for_backward(*operands, targets, outputs[4], call.options.row.temperatures)
        ctx.call = call
        ctx.set_materialize_grads(False)
        if full:
            ctx.mark_non_differentiable(*outputs[4:])
        return outputs if full else outputs[:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        grads = grads[:4]
        if all(g is None for g in grads):
            return (None,) * 10
        *tensors, targets, state, _ = ctx.saved_tensors
        operands, needs = Operands(*tensors), Needs(*ctx.needs_input_grad[3:8])
        run = ctx.call.way((*operands, *grads), _stats_bwd, _stats_bwd_operation)
        formed = run(operands, ctx.call, targets, state, grads, needs)
        return None, None, None, *formed, None, None


def run_head_token_stats(
    operands: Operands, call: HeadCall, targets: Tensor, full: bool = False
) -> tuple[Tensor, ...]:
    """logp, entropy, unit_polarity and lse, and if `full` the states and the sums of rows, as
    `Passes.token_stats_fwd`."""
    outputs: tuple[Tensor, ...] = _TokenStats.apply(call, targets, full, *operands)
    return outputs


# ---- policy_loss --------------------------------------------------------------------------------


def _losses(
    operands: Operands, call: HeadCall, inputs: LossInputs, needs: Needs
) -> tuple[Any, ...]:
    """What sums to the loss, the other fields of `PolicyLossOutput`, then the loss's gradients;
    None where not needed."""
    outputs, grads = call.passes(operands, inputs.targets).policy_loss(inputs, needs)
    return *outputs, *call.summed(grads, operands.hidden.dtype)


@custom_op(
    "papo::linear_policy_loss",
    mutates_args=(),
    schema=f"({OPERAND_SCHEMA}, {LOSS_SCHEMA}, {CHUNK_SCHEMA}, bool[] needs) -> ({OUTPUT_SCHEMA}, "
    f"{GRADIENT_SCHEMA})",
)
def linear_policy_loss(*arguments: Any) -> tuple[Tensor, ...]:
    """The fields of `PolicyLossOutput`, then the gradients of the loss where `needs` says so."""
    *flat, lora_scaling, logits_dtype, chunk_bytes, needs = arguments
    operands, inputs = Operands(*flat[:7]), unflattened(flat[7:])
    options = PassOptions(inputs.row, inputs.backend, lora_scaling, logits_dtype, chunk_bytes)
    token_loss, *outputs = _losses(operands, HeadCall(options, None), inputs, Needs(*needs))
    return token_loss.sum(), *outputs[:7], *_present(operands.hidden, outputs[7:])


@linear_policy_loss.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    operands = Operands(*arguments[:7])
    return *fake_policy_loss(operands.hidden), *_fake_gradients(operands, arguments[-1])


def _losses_operation(
    operands: Operands, call: HeadCall, inputs: LossInputs, needs: Needs
) -> tuple[Any, ...]:
    chunks = call.options[2:]
    outputs = linear_policy_loss(*operands, *flattened(inputs), *chunks, list(needs))
    return *outputs[:8], *_wanted(outputs[8:], needs)


def run_head_policy_loss(
    operands: Operands, call: HeadCall, inputs: LossInputs
) -> tuple[Tensor, ...]:
    """The fields of `PolicyLossOutput`."""
    needs = operands.needs()
    detached = Operands(*(None if x is None else x.detach() for x in operands))  # type: ignore[arg-type]
    run = call.way(operands, _losses, _losses_operation)
    outputs = run(detached, call, inputs, needs)
    losses, parts, grads = outputs[0], outputs[1:8], outputs[8:]
    if not any(needs):
        return losses.sum(), *parts
    return FormedLoss.apply(losses, grads, inputs.backend, False, *operands[:5]), *parts
