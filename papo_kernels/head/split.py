"""A head whose rows are spread over ranks: where they lie, and what the ranks exchange.

Every rank of the group holds the same hidden states, targets and per-token inputs, and its own rows
of the head's weight (Megatron's vocabulary parallelism): rank r's rows follow those of rank r - 1.
Any split will do, shards without rows and shards of nothing but padding among them. All ranks get
the same results, those of the whole head to float32 rounding. Gradients: of the weight's shard on
its own rank; of hidden, and of the LoRA factor A, the full one on every rank.

A head is made on each rank alone, and so are its errors. A call is a collective: every rank makes
it, and goes backward through it, with the same arguments but for `weight`, `bias` and `lora.b`, and
the same upstream gradients. The ranks exchange

- a dozen integers, so that all know the split and raise the same errors; not with `shards`;
- row states, 48 bytes per token, and 8 for each of several ids: in one all-gather for statistics,
  in one per chunk of tokens for the loss, which forms its gradients as it goes;
- where there are gradients, the partial gradient of hidden in float32, in one all-reduce. The loss
  makes it in its forward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from papo_kernels.types import STATE_SIZE

WORLD = "world"  # the default group, which need not exist when a head is made


def check_group(group: object) -> None:
    """A process group, or WORLD.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(group, str):
        if group != WORLD:
            raise ValueError(f"group: expected {WORLD!r}, a process group or None, got {group!r}")
        return
    # A rank outside of a group has this in its place; the call says so.
    outside = dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER
    if not outside and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"group: expected {WORLD!r}, a process group or None, got {type(group).__name__}"
        )


def default_or(group: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """`group` as torch.distributed takes it, None for WORLD."""
    return None if isinstance(group, str) else group


class Split(NamedTuple):
    """Where this rank's rows lie."""

    group: dist.ProcessGroup | None
    rows: tuple[int, ...]  # of every rank's shard
    rank: int

    @property
    def first(self) -> int:
        """Id of this rank's first row."""
        return sum(self.rows[: self.rank])

    def columns(self, vocab_size: int) -> int:
        """Rows of the largest shard that are not padding: all ranks cut the same chunks."""
        starts = [sum(self.rows[:r]) for r in range(len(self.rows))]
        return max(
            min(held, vocab_size - start) for start, held in zip(starts, self.rows, strict=True)
        )

    def merge(self, state: Tensor) -> Tensor:
        """The states of whole rows, ``[n, 6]`` or with the scaled logits of k ids ``[n, 6 + k]``,
        from this shard's; a collective."""
        # Here, since importing papo_kernels loads no backend.
        from papo_kernels.reference import merge_states

        states = state.new_empty((len(self.rows) * state.shape[0], state.shape[1]))
        dist.all_gather_into_tensor(states, state.contiguous(), group=self.group)
        states = states.view(len(self.rows), *state.shape)
        merged = merge_states(states[..., :STATE_SIZE])
        if state.shape[1] == STATE_SIZE:
            return merged
        return torch.cat([merged, states[..., STATE_SIZE:].amax(dim=0)], dim=1)

    def add(self, sums: Tensor) -> None:
        """Adds those of all shards, where there are any; a collective."""
        if sums.numel():
            dist.all_reduce(sums, group=self.group)

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
