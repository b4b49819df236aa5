"""`linear_token_stats` and `linear_policy_loss` over a vocabulary split across ranks.

Every rank of the group holds the same hidden states, targets and per-token inputs, and its own rows
of the head's weight (Megatron's vocabulary parallelism): rank r's rows follow those of rank r - 1.
Any split will do, shards without rows and shards of nothing but padding among them. All ranks get
the same results, those of the whole head to float32 rounding. Gradients: of the weight's shard on
its own rank; of hidden, and of the LoRA factor A, the full one on every rank.

Collectives of a call: one of a dozen integers, so that every rank knows the split and raises the
same errors (not where `shards` tells); one all-gather of row states, 48 bytes per token (one per
chunk of tokens in the loss, whose gradients are formed as it goes); one all-reduce of the partial
gradient of hidden, in float32. Without gradients there is no all-reduce.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from papo_kernels.backends.choice import choose
from papo_kernels.checks import check_row_options, flat, shaped
from papo_kernels.ops.policy_loss import FormedLoss
from papo_kernels.ops.token_stats import refuse_double_backward, refuse_lse
from papo_kernels.reference import merge_states
from papo_kernels.types import (
    LoRAHead,
    PolarityWeighting,
    PolicyLossOutput,
    PolicyLossParams,
    TokenInputs,
    TokenStats,
)

from .checks import ChunkArguments, HeadArguments, RowArguments, prepare, prepare_loss
from .keep import KeepSet
from .passes import HeadInputs, HeadOptions, HeadPass, Shard
from .plan import Needs, default_workspace


def parallel_linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shards: Sequence[int] | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    keep: KeepSet | None = None,
    lora: LoRAHead | None = None,
    logits_dtype: torch.dtype | None = None,
) -> TokenStats:
    """`linear_token_stats` with the rows of the head spread over the ranks of `group`.

    A collective: every rank calls it, and goes backward through it, with the same arguments but for
    `weight`, `bias` and `lora.b`, and the same upstream gradients.

    Args:
        weight: ``[V_r, D]``, this rank's rows, V_r >= 0. `bias` ``[V_r]`` and `lora.b`
            ``[V_r, r]`` are split alike; `lora.a` is whole.
        targets: ids in the whole vocabulary, and so are those of `keep`.
        group: None for the default group.
        shards: V_r of every rank, where known: saves the exchange of integers, and with it the wait
            for a GPU; arguments are then checked on each rank alone, and `chunk_bytes` is needed
            where the ranks' GPUs have different memory.
        vocab_size: of the whole vocabulary: rows from there on, on whichever rank, are padding.
        hidden, temperature, softcap, logit_scale, chunk_bytes, backend, keep, lora, logits_dtype:
            as for `linear_token_stats`.

    Returns:
        TokenStats, the same on every rank.

    Raises:
        TypeError, ValueError: as `linear_token_stats`, on every rank where one of them does; and
            for arguments that should be the same on every rank and are not.
    """
    split, inputs, options = _agree(
        _Where(group, shards),
        hidden,
        targets,
        HeadArguments(weight, bias, lora, logit_scale, keep),
        RowArguments(temperature, softcap, vocab_size),
        ChunkArguments(chunk_bytes, logits_dtype, backend),
    )
    stats = _TokenStats.apply(split, options, flat(targets, torch.int64), *inputs)
    return TokenStats(*shaped(stats, targets))


def parallel_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    token_weight: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shards: Sequence[int] | None = None,
    bias: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    params: PolicyLossParams | None = None,
    weighting: PolarityWeighting | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    keep: KeepSet | None = None,
    lora: LoRAHead | None = None,
    logits_dtype: torch.dtype | None = None,
) -> PolicyLossOutput:
    """`linear_policy_loss` with the rows of the head spread over the ranks of `group`.

    Three matrix products and no recomputation, as there; the gradient of hidden is reduced in the
    forward pass, so backward needs no collective.

    Args:
        group, shards, weight, bias, lora, keep, vocab_size: as for `parallel_linear_token_stats`.
        hidden, targets, advantages, token_weight, old_logp, ref_logp, params, weighting,
            temperature, softcap, logit_scale, chunk_bytes, backend, logits_dtype: as for
            `linear_policy_loss`.

    Returns:
        PolicyLossOutput, the same on every rank.

    Raises:
        TypeError, ValueError: as `parallel_linear_token_stats`.
    """
    tokens = TokenInputs(advantages, token_weight, old_logp, ref_logp)
    prepared = functools.partial(prepare_loss, targets, tokens, params, weighting)
    split, inputs, options = _agree(
        _Where(group, shards),
        hidden,
        targets,
        HeadArguments(weight, bias, lora, logit_scale, keep),
        RowArguments(temperature, softcap, vocab_size),
        ChunkArguments(chunk_bytes, logits_dtype, backend),
        prepared,
    )
    call = prepared(options)
    needs = inputs.needs()
    with torch.no_grad():
        head_pass = HeadPass(inputs, options, call.targets, split.shard(options.row.vocab_size))
        (token_loss, *parts), partial = head_pass.policy_loss(call, needs)
        grads = split.reduce(partial, hidden.dtype)
    loss = FormedLoss.apply(token_loss, grads, call.backend, *inputs[:5])
    return PolicyLossOutput(loss, *shaped(parts, targets))


# ---- the split ----------------------------------------------------------------------------------


class _Split(NamedTuple):
    """Where this rank's rows lie."""

    group: dist.ProcessGroup | None
    rows: tuple[int, ...]  # of every rank's shard
    rank: int

    def shard(self, vocab_size: int) -> Shard:
        first = sum(self.rows[: self.rank])
        starts = [sum(self.rows[:r]) for r in range(len(self.rows))]
        columns = max(
            min(held, vocab_size - start) for start, held in zip(starts, self.rows, strict=True)
        )
        return Shard(first, columns, self._merge)

    def _merge(self, state: Tensor) -> Tensor:
        states = state.new_empty((len(self.rows) * state.shape[0], state.shape[1]))
        dist.all_gather_into_tensor(states, state.contiguous(), group=self.group)
        return merge_states(states.view(len(self.rows), *state.shape))

    def reduce(self, grads: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
        """`grads` (of hidden, weight, bias, lora_a, lora_b) with those of hidden and lora_a summed
        over the ranks, in one collective."""
        hidden, weight, bias, lora_a, lora_b = grads
        partial = [g for g in (hidden, lora_a) if g is not None]
        if len(partial) == 1:
            dist.all_reduce(partial[0], group=self.group)
        elif partial:
            joined = torch.cat([g.view(-1) for g in partial])
            dist.all_reduce(joined, group=self.group)
            for g, part in zip(partial, joined.split([g.numel() for g in partial]), strict=True):
                g.copy_(part.view_as(g))
        hidden, lora_a = (None if g is None else g.to(dtype) for g in (hidden, lora_a))
        return [hidden, weight, bias, lora_a, lora_b]


class _Where(NamedTuple):
    """`group` and `shards` as the public functions take them."""

    group: dist.ProcessGroup | None
    shards: Sequence[int] | None


def _agree(
    where: _Where,
    hidden: Tensor,
    targets: Tensor,
    head: HeadArguments,
    row: RowArguments,
    chunks: ChunkArguments,
    check_more: Callable[[HeadOptions], object] = lambda options: None,
) -> tuple[_Split, HeadInputs, HeadOptions]:
    """The checked call; raises on every rank what it, or `check_more`, raises on one."""
    group, shards = where
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: expected a process group, but torch.distributed is not initialised"
        )
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected one that this rank belongs to")
    if shards is not None:
        rows = tuple(int(x) for x in shards)
        if len(rows) != world or rows[rank] != head.weight.shape[0]:
            raise ValueError(
                f"shards: expected {world} numbers of rows, of which this rank's ({rank}) is "
                f"{head.weight.shape[0]}, got {rows}"
            )
        inputs, options = prepare(hidden, targets, head, row, chunks, sum(rows))
        return _Split(group, rows, rank), inputs, options

    error: Exception | None = None
    facts = dict.fromkeys(_FACTS, 0)
    try:
        # No rank knows the number of rows yet: vocab_size is compared with it below.
        unread = row._replace(vocab_size=None) if isinstance(row.vocab_size, int) else row
        inputs, options = prepare(hidden, targets, head, unread, chunks, 1)
        choose(options.backend or None, hidden.device, options.logits_dtype)
        check_more(options)
        facts = _facts(inputs, options, targets, row.vocab_size)
    except (TypeError, ValueError) as caught:
        error = caught
    everyone = _exchange([int(error is None), *facts.values()], group, _device(hidden))
    if not all(fine for fine, *_ in everyone):
        _raise_together(error, group)
    of_ranks = dict(zip(facts, zip(*(values for _, *values in everyone), strict=True), strict=True))
    for name, values in of_ranks.items():
        if name not in _LOCAL and len(set(values)) > 1:
            raise ValueError(f"{name}: expected the same on every rank, got {list(values)}")
    rows = of_ranks["rows of weight"]
    columns = check_row_options(sum(rows), *row, counted="rows of weight on all ranks")
    options = options._replace(
        row=options.row._replace(vocab_size=columns), chunk_bytes=min(of_ranks["workspace bytes"])
    )
    return _Split(group, rows, rank), inputs, options


_LOCAL = ("rows of weight", "workspace bytes")
_FACTS = (
    *_LOCAL,
    "columns of weight",
    "number of tokens",
    "dtype of hidden",
    "logits_dtype",
    "vocab_size",
    "inputs that require grad",
    "rank of lora",
    "number of kept ids",
    "sum of targets",
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _facts(
    inputs: HeadInputs, options: HeadOptions, targets: Tensor, vocab_size: int | None
) -> dict[str, int]:
    values = (
        inputs.weight.shape[0],
        options.chunk_bytes or default_workspace(inputs.hidden.device),
        inputs.weight.shape[1],
        inputs.hidden.shape[0],
        _DTYPES.index(inputs.hidden.dtype),
        _DTYPES.index(options.logits_dtype),
        -1 if vocab_size is None else vocab_size,
        sum(needed << i for i, needed in enumerate(inputs.needs())),
        0 if inputs.lora_a is None else inputs.lora_a.shape[0],
        -1 if inputs.keep_ids is None else inputs.keep_ids.numel(),
        int(targets.sum()),
    )
    return dict(zip(_FACTS, values, strict=True))


def _device(hidden: object) -> torch.device:
    return hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")


def _exchange(
    values: list[int], group: dist.ProcessGroup | None, device: torch.device
) -> list[list[int]]:
    """`values` of every rank, in rank order."""
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    everyone = mine.new_empty(dist.get_world_size(group) * len(values))
    dist.all_gather_into_tensor(everyone, mine, group=group)
    rows: list[list[int]] = everyone.view(-1, len(values)).tolist()
    return rows


def _raise_together(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Every rank raises the error of the first rank that has one."""
    mine = None if error is None else (isinstance(error, TypeError), str(error))
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    at, (is_type, message) = next((r, e) for r, e in enumerate(everyone) if e is not None)
    if any(e != everyone[at] for e in everyone):
        message = f"{message} (on rank {at} of the group)"
    raise (TypeError if is_type else ValueError)(message) from error


# ---- autograd -----------------------------------------------------------------------------------


class _TokenStats(torch.autograd.Function):
    """logp, entropy, unit_polarity and lse of all tokens; backward reduces over the ranks."""

    @staticmethod
    def forward(
        ctx: Any, split: _Split, options: HeadOptions, targets: Tensor, *inputs: Any
    ) -> tuple[Tensor, ...]:
        shard = split.shard(options.row.vocab_size)
        *stats, state = HeadPass(HeadInputs(*inputs), options, targets, shard).token_stats_fwd()
        ctx.split, ctx.options = split, options
        ctx.save_for_backward(*inputs, targets, state)
        ctx.set_materialize_grads(False)
        return tuple(stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        refuse_lse(grads[3])
        if all(g is None for g in grads[:3]):
            return (None,) * len(ctx.needs_input_grad)
        *tensors, targets, state = ctx.saved_tensors
        inputs, shard = HeadInputs(*tensors), ctx.split.shard(ctx.options.row.vocab_size)
        head_pass = HeadPass(inputs, ctx.options, targets, shard)
        partial = head_pass.token_stats_bwd(state, grads[:3], Needs(*ctx.needs_input_grad[3:8]))
        return None, None, None, *ctx.split.reduce(partial, inputs.hidden.dtype), None, None
