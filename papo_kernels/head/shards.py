"""A head whose rows are spread over ranks: the split, what is summed over it, and one checked call.

Every rank of the group holds the same hidden states, targets and per-token inputs, and its own rows
of the head's weight (Megatron's vocabulary parallelism): rank r's rows follow those of rank r - 1.
Any split will do, shards without rows and shards of nothing but padding among them. All ranks get
the same results, those of the whole head to float32 rounding. Gradients: of the weight's shard on
its own rank; of hidden, and of the LoRA factor A, the full one on every rank.

A call is a collective: every rank makes it, and goes backward through it, with the same arguments
but for `weight`, `bias` and `lora.b`, and the same upstream gradients. The ranks exchange

- a dozen integers, so that all know the split and raise the same errors; not with `shards`;
- row states, 48 bytes per token: in one all-gather for statistics, in one per chunk of tokens for
  the loss, which forms its gradients as it goes;
- where there are gradients, the partial gradient of hidden in float32, in one all-reduce. The loss
  makes it in its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from papo_kernels.backends import choose
from papo_kernels.checks import counted_columns
from papo_kernels.source import Compute, LazyLogits

from .checks import prepare
from .passes import Operands, PassOptions, Shard
from .plan import default_workspace

T = TypeVar("T")


# ---- the split ----------------------------------------------------------------------------------


class Split(NamedTuple):
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
        # Here, since importing papo_kernels loads no backend.
        from papo_kernels.reference import merge_states

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


def agree(
    logits: LazyLogits,
    targets: Tensor,
    temperature: float,
    compute: Compute,
    more: Callable[[PassOptions], T],
) -> tuple[Split, Operands, PassOptions, T]:
    """The checked call, and what `more` returns for its options. An error of one rank is raised on
    every rank. A collective, unless the head's `shards` are known."""
    hidden, head, _ = logits
    group, shards = head.group, head.shards
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: expected a process group, but torch.distributed is not initialized"
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
        operands, options = prepare(logits, targets, temperature, compute, sum(rows))
        return Split(group, rows, rank), operands, options, more(options)

    error: Exception | None = None
    facts = dict.fromkeys(_FACTS, 0)
    try:
        # No rank knows the number of all rows yet: vocab_size is compared with it below.
        unread = logits._replace(head=replace(head, vocab_size=None))
        operands, options = prepare(unread, targets, temperature, compute, 1)
        choose(options.backend or None, hidden.device, options.logits_dtype)
        made = more(options)
        facts = _facts(operands, options, targets, head.vocab_size)
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
    columns = counted_columns(sum(rows), head.vocab_size, "rows of weight on all ranks")
    options = options._replace(
        row=options.row._replace(vocab_size=columns), chunk_bytes=min(of_ranks["workspace bytes"])
    )
    return Split(group, rows, rank), operands, options, made


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
    operands: Operands, options: PassOptions, targets: Tensor, vocab_size: int | None
) -> dict[str, int]:
    values = (
        operands.weight.shape[0],
        options.chunk_bytes or default_workspace(operands.hidden.device),
        operands.weight.shape[1],
        operands.hidden.shape[0],
        _DTYPES.index(operands.hidden.dtype),
        _DTYPES.index(options.logits_dtype),
        -1 if vocab_size is None else vocab_size,
        sum(needed << i for i, needed in enumerate(operands.needs())),
        0 if operands.lora_a is None else operands.lora_a.shape[0],
        -1 if operands.keep_ids is None else operands.keep_ids.numel(),
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
