"""Statistics of the old and of the reference policy on sampled tokens: passes without gradient.

They go through the same module, the same micro-batches and the same kernels as the loss, so that
the first update's ratio is exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from papo.dist.collectives import all_max
from papo.policy.batch import MicroBatch, TrainingSequence, micro_batches
from papo.policy.objective import evaluating, stats_of
from papo_kernels import TokenStats


def pass_count(sequences: Sequence[TrainingSequence], size: int) -> int:
    """Passes every rank must run: micro-batches of the rank with most, at least 1; a collective."""
    return max(1, int(all_max(-(-len(sequences) // size))))


def token_stats_of(
    engine: Any,
    sequences: Sequence[TrainingSequence],
    size: int,
    make_batch: Callable[[Sequence[TrainingSequence]], MicroBatch],
) -> list[TokenStats]:
    """Per-sequence statistics (float32, CPU) under the engine's current weights."""
    per_sequence: list[TokenStats] = []
    with evaluating(engine):
        for piece in micro_batches(sequences, size, count=pass_count(sequences, size)):
            stats = stats_of(engine, make_batch(piece))
            if piece[0].group < 0:
                continue
            lengths = [len(s.response_ids) for s in piece]
            columns = [column.cpu().split(lengths) for column in stats]
            per_sequence += [TokenStats(*parts) for parts in zip(*columns, strict=True)]
    return per_sequence


def attach(
    sequences: Sequence[TrainingSequence],
    config: Any,
    engine: Any,
    reference: Any | None,
    make_batch: Callable[[Sequence[TrainingSequence]], MicroBatch],
    weights_of: Callable[[TokenStats, TrainingSequence], Tensor] | None,
) -> list[TrainingSequence]:
    """Set what the loss needs of other policies; collective passes only where something needs them.

    `old_logp` where a rollout serves several updates (a single update is on-policy: its ratio is 1
    by definition), `ref_logp` where the KL term is on, `factor` where polarity comes from the old
    policy's pass.

    Args:
        config: the whole config.
        weights_of: polarity weights of one sequence's tokens from its old statistics, None where
            the kernel forms them.
    """
    size = config.optim.micro_batch_size
    result = list(sequences)
    if config.optim.updates_per_rollout > 1 or weights_of is not None:
        old = token_stats_of(engine, result, size, make_batch)
        if weights_of is not None:
            factors = [weights_of(stats, seq) for stats, seq in zip(old, result, strict=True)]
            result = [replace(s, factor=f) for s, f in zip(result, factors, strict=True)]
        if config.optim.updates_per_rollout > 1:
            result = [replace(s, old_logp=o.logp) for s, o in zip(result, old, strict=True)]
    if reference is not None:
        ref = token_stats_of(reference, result, size, make_batch)
        result = [replace(s, ref_logp=r.logp) for s, r in zip(result, ref, strict=True)]
    return result
