"""Whether completions may share their prompt's row, seen on the first batch in which some do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from papo.dist import collectives
from papo.policy.batch import TrainingSequence, micro_batches
from papo.record.progress import Progress
from papo.train import probe
from papo.train.stats import Passes


class RowCheck:
    """Compares log-probs in shared rows with those in rows of their own, once in a run.

    Args:
        passes: where rows turn out not to be shared safely, its batcher gives each completion its
            own row from the check on.
        noise: KL to the sampler (nats) that rounding explains.
        wanted: False where nothing is to be checked.
        progress: shows a line where completions share no row from the check on.
    """

    def __init__(self, passes: Passes, noise: float, wanted: bool, progress: Progress) -> None:
        self._passes = passes
        self._noise = noise
        self._open = wanted
        self._progress = progress

    def check(self, sequences: Sequence[TrainingSequence]) -> None:
        """Compare, if some of `sequences` could share a row and none have before; a collective."""
        batcher = self._passes.batcher
        if not self._open or not batcher.max_row_tokens:
            return
        pieces = micro_batches(sequences, self._passes.size, count=1)
        piece = max(pieces, key=lambda p: sum(len(s.response_ids) for s in p))
        shared = batcher.batch(piece)
        if collectives.all_max(float(shared.segment_ids is not None)) == 0.0:
            return
        self._open = False
        apart = replace(batcher, max_row_tokens=0).batch(piece)
        fault = probe.rows_fault(self._passes.engine, shared, apart, self._noise)
        if fault:
            batcher.max_row_tokens = 0
            self._progress.say(f"completions no longer share their prompt's row: {fault}")
