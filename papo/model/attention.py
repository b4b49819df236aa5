"""Attention masks of rows whose completions share a prompt.

A decoder makes its own masks, one per kind of layer (full, sliding window, chunked), from a
function of a query's and a key's index. In a row that several completions share, that function is
asked for their positions instead, and only pairs of one completion, or of a completion and its
prompt, are let through. So whatever a model's own code restricts attention to holds here too, in
the form that its attention takes: boolean for sdpa, added numbers for eager.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

# The attention implementations whose masks can say which pairs may attend.
_IMPLEMENTATIONS = ("sdpa", "eager")


@contextlib.contextmanager
def shared_prompts(segment_ids: Tensor | None, position_ids: Tensor) -> Iterator[None]:
    """While it lasts, decoders that run without a cache make the masks of rows that are shared.

    Args:
        segment_ids: int64 [B, T], 0 for a prompt, 1 and on for its completions, -1 for padding;
            None where no row is shared, and the masks stay the model's own.
        position_ids: int64 [B, T], a completion's go on from its prompt's.
    """
    if segment_ids is None:
        yield
        return
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    before = {name: masks[name] for name in _IMPLEMENTATIONS}
    for name, make in before.items():
        masks[name] = partial(_mask, make, segment_ids, position_ids)
    try:
        yield
    finally:
        for name, make in before.items():
            del masks[name]  # what this process had registered shows again
            if masks[name] is not make:
                masks[name] = make


def _mask(
    make: Callable[..., Tensor | None],
    segment_ids: Tensor,
    position_ids: Tensor,
    *,
    mask_function: Callable[..., Tensor],
    **options: Any,
) -> Tensor | None:
    """`make`'s mask with `mask_function` seen through the tree of completions."""

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own, other = segment_ids[batch, query], segment_ids[batch, key]
        related = ((own == other) | (other == 0)) & (own >= 0)
        positions = position_ids[batch, query], position_ids[batch, key]
        # A padded query attends to itself alone: a row of the mask without any True is NaN in some
        # attention kernels.
        return (related & mask_function(batch, head, *positions)) | (query == key)

    # Padding is in the segments, and is_causal would drop the mask.
    without = {"attention_mask": None, "allow_is_causal_skip": False}
    return make(mask_function=allowed, **{**options, **without})
