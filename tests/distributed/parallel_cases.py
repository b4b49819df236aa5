"""Cases whose head is split over the ranks, for parallel_tasks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from papo_kernels import PolarityWeighting, PolicyLossOutput, PolicyLossParams, TokenStats
from papo_kernels.head.shards import parallel_linear_policy_loss, parallel_linear_token_stats
from tests.kernels.linear_cases import TOKEN_INPUTS, HeadCase, make_head_case

# Rows of the weight per rank: uneven, a shard without rows, and (vocab_size 80) one of padding.
ROWS, VOCAB = 100, 80
SPLITS = {
    2: {"uneven": [37, 63], "empty": [0, 100], "padding": [80, 20]},
    4: {"uneven": [37, 1, 20, 42], "empty": [25, 0, 75, 0], "padding": [30, 55, 0, 15]},
}
SPLIT_LIKE_WEIGHT = ("weight", "bias", "lora_b")
LOSS = {
    "params": PolicyLossParams(clip_high=0.28, dual_clip=3.0, kl_coef=0.05, entropy_coef=0.01),
    "weighting": PolarityWeighting(0.5, -0.6, shape="tanh", sigma=0.1, scale=1.1),
}


@dataclass(frozen=True)
class SplitCase(HeadCase):
    """A case whose calls see this rank's rows. Gradients of the shards are put together again, so
    that the checks of the whole head apply."""

    split: tuple[int, ...] = ()
    group: Any = None

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

    def token_stats(self, leaves: dict[str, Tensor], **more: Any) -> TokenStats:
        shard = self.shards(leaves)
        options = {**self.options(shard), "group": self.group, **more}
        return parallel_linear_token_stats(
            shard["hidden"], shard["weight"], self.tokens.targets, **options
        )

    def policy_loss(self, leaves: dict[str, Tensor], **more: Any) -> PolicyLossOutput:
        shard = self.shards(leaves)
        inputs = {name: getattr(self.tokens, name) for name in TOKEN_INPUTS}
        options = {**self.options(shard), **inputs, "group": self.group, **more}
        return parallel_linear_policy_loss(
            shard["hidden"], shard["weight"], self.tokens.targets, **options
        )


def split_case(case: HeadCase, name: str = "uneven", group: Any = None) -> SplitCase:
    split = tuple(SPLITS[dist.get_world_size(group)][name])
    return SplitCase(**vars(case), split=split, group=group)


def some_case(split: str = "uneven", **more: Any) -> SplitCase:
    options = {"bias": True, "vocab_size": VOCAB, **more}
    return split_case(make_head_case(23, 12, ROWS, **options), split)


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
