"""Every sampled completion on disk, completions.jsonl.

Written by rank 0 alone, every row once, also across kill and resume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from papo.dist import collectives
from papo.policy.advantage import ScoredGroup
from papo.record.jsonl import JsonLines


class CompletionsWriter:
    """Every sampled completion as a row of completions.jsonl.

    Args:
        run_dir: folder of the run; it exists.
        enabled: False on every rank but 0, and where completions are not wanted.
    """

    def __init__(self, run_dir: Path, enabled: bool) -> None:
        self._lines = JsonLines(run_dir / "completions.jsonl") if enabled else None

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows of a step (`completion_rows`); `step` is added.

        Raises:
            PapoError: they cannot be written.
        """
        if self._lines is not None:
            self._lines.append({"step": step, **row} for row in rows)

    def truncate_after(self, step: int) -> None:
        """Drop the rows of steps after `step`; -1 drops everything."""
        if self._lines is not None:
            self._lines.keep_up_to(step)

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()


def completion_rows(groups: Sequence[ScoredGroup]) -> list[dict[str, Any]]:
    """One row per completion of all ranks' groups, in the order of the groups; a collective.

    Args:
        groups: this rank's.
    """
    mine = [
        {
            "group": group.index,
            "uid": c.problem.uid,
            "prompt": c.problem.messages[-1]["content"],
            "answer": c.problem.answer,
            "text": c.text,
            "length": len(c.response_ids),
            "truncated": c.truncated,
            "reward": _number(r.value),
            "rewards": {name: _number(value) for name, value in r.parts.items()},
            "status": r.status,
            "advantage": a,
        }
        for group in groups
        for c, r, a in zip(group.completions, group.rewards, group.advantages, strict=True)
    ]
    return sorted(collectives.gather_lists(mine), key=lambda row: row["group"])


def _number(reward: float) -> float | None:
    return None if math.isnan(reward) else reward
