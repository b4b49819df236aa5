"""Cases whose head is split over the ranks, for shard_tasks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from papo_kernels import Head, Objective, PolarityWeighting
from tests.kernels.head_cases import HeadCase, Traits, make_head_case

# Rows of the weight per rank: uneven, a shard without rows, and (vocab_size 80) one of padding.
ROWS, VOCAB = 100, 80
SPLITS = {
    2: {"uneven": [37, 63], "empty": [0, 100], "padding": [80, 20]},
    4: {"uneven": [37, 1, 20, 42], "empty": [25, 0, 75, 0], "padding": [30, 55, 0, 15]},
}
SPLIT_LIKE_WEIGHT = ("weight", "bias", "lora_b")
LOSS = {
    "objective": Objective(clip_high=0.28, dual_clip=3.0, kl_coef=0.05, entropy_coef=0.01),
    "weighting": PolarityWeighting(0.5, -0.6, shape="tanh", sigma=0.1, scale=1.1),
}


@dataclass(frozen=True)
class SplitCase(HeadCase):
    """A case whose calls see this rank's rows. Gradients of the shards are put together again, so
    that the checks of the whole head apply.

    Attributes:
        split: rows of every rank's shard.
        told: whether the head is told so, or its calls find out.
    """

    split: tuple[int, ...] = ()
    group: Any = None
    told: bool = False

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        leaves = super().leaves(dtype)
        if dtype is None:  # of the call under test; otherwise of the formulas it is held against
            for name in SPLIT_LIKE_WEIGHT:
                if name in leaves:
                    leaves[name].register_hook(self._sum)
        return leaves

    def _sum(self, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def shards(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        rank = dist.get_rank(self.group)
        first = sum(self.split[:rank])
        rows = slice(first, first + self.split[rank])
        return {k: x[rows] if k in SPLIT_LIKE_WEIGHT else x for k, x in leaves.items()}

    def head(self, leaves: dict[str, Tensor]) -> Head:
        """Of this rank's rows of the whole `leaves`."""
        whole = super().head(self.shards(leaves))
        return replace(whole, group=self.group, shards=self.split if self.told else None)


def split_case(case: HeadCase, name: str = "uneven", group: Any = None) -> SplitCase:
    """`group`: None for all ranks."""
    group = group or dist.group.WORLD
    split = tuple(SPLITS[dist.get_world_size(group)][name])
    return SplitCase(**vars(case), split=split, group=group)


def some_case(split: str = "uneven", traits: Traits | None = None, **more: Any) -> SplitCase:
    """A head of `ROWS` rows with a bias, and the last of them padding."""
    traits = replace(traits or Traits(), bias=True, vocab_size=VOCAB)
    return split_case(make_head_case(23, 12, ROWS, traits, **more), split)


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each collective is called inside."""
    names = ("all_gather_into_tensor", "all_reduce", "all_gather_object")
    real = {name: getattr(dist, name) for name in names}
    counts: Counter[str] = Counter()

    def wrap(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return real[name](*args, **options)

        return call

    for name in names:
        setattr(dist, name, wrap(name))
    try:
        yield counts
    finally:
        for name in names:
            setattr(dist, name, real[name])
