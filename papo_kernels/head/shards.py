"""One checked call of a head whose rows are spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from papo_kernels.backends import choose
from papo_kernels.checks import FLOAT_DTYPES, counted_columns
from papo_kernels.inputs import LossArguments
from papo_kernels.types import Compute, LossInputs

from .checks import UNKNOWN, loss_inputs, prepare
from .head import LazyLogits
from .passes import Operands, PassOptions
from .plan import default_workspace
from .split import Split, default_or


def agree(
    logits: LazyLogits,
    targets: Tensor,
    temperature: float | Tensor,
    compute: Compute,
    loss: LossArguments | None,
) -> tuple[Operands, PassOptions, LossInputs | None, Split]:
    """What `prepare` and `loss_inputs` return, and the split.

    A collective, unless the head's `shards` are known: what one rank raises all raise.
    """
    hidden, head, _ = logits
    group, shards = default_or(head.group), head.shards
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: expected one that exists, but torch.distributed is not initialized"
        )
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected one that this rank belongs to")
    if shards is not None:
        rows = tuple(shards)
        operands, options = prepare(logits, targets, temperature, compute, sum(rows))
        if len(rows) != world or rows[rank] != head.weight.shape[0]:
            raise ValueError(
                f"shards: expected {world} numbers of rows, of which this rank's ({rank}) is "
                f"{head.weight.shape[0]}, got {rows}"
            )
        return operands, options, loss_inputs(loss, options), Split(group, rows, rank)

    error: Exception | None = None
    facts = dict.fromkeys(_FACTS, 0)
    try:
        # No rank knows the number of all rows yet: vocab_size is compared with it below.
        operands, options = prepare(logits, targets, temperature, compute, UNKNOWN)
        choose(options.backend or None, hidden.device, options.logits_dtype)
        inputs = loss_inputs(loss, options)
        facts = _facts(operands, options, targets, head.vocab_size)
    except Exception as caught:  # of whatever kind: the other ranks wait
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
    row, workspace = options.row._replace(vocab_size=columns), min(of_ranks["workspace bytes"])
    options = options._replace(row=row, chunk_bytes=workspace)
    inputs = None if inputs is None else inputs._replace(row=row)
    return operands, options, inputs, Split(group, rows, rank)


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


def _facts(
    operands: Operands, options: PassOptions, targets: Tensor, vocab_size: int | None
) -> dict[str, int]:
    values = (
        operands.weight.shape[0],
        options.chunk_bytes or default_workspace(operands.hidden.device),
        operands.weight.shape[1],
        operands.hidden.shape[0],
        FLOAT_DTYPES.index(operands.hidden.dtype),
        FLOAT_DTYPES.index(options.logits_dtype),
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
