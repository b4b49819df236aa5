"""Whether a run still learns: when it stops because it has gone bad, and what is said then."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from papo.config import HealthConfig
from papo.dist import collectives
from papo.dist.folders import completed
from papo.dist.manifest import read_manifest, read_trainer
from papo.errors import PapoError
from papo.policy.advantage import ScoredGroup
from papo.policy.update import Update

_LOST = ("error", "timeout")


class CheckedEngine(Protocol):
    """What is asked of `papo.dist.engine.Engine`."""

    def finite(self) -> bool:
        """Whether this rank's part of weights and moments is; no collective."""


class Health:
    """Counts the steps that teach nothing, and finds what is not finite.

    Args:
        config: the config's `health` section.
        checkpoints: folder of the run's checkpoints.
        steps: of the whole run, which is bad if all of them teach nothing.

    Attributes:
        bad_steps: how many of the last steps taught nothing, in a row up to the last one; a
            resumed run sets it to its checkpoint's.
    """

    def __init__(
        self, config: HealthConfig, engine: CheckedEngine, checkpoints: Path, steps: int
    ) -> None:
        self._limit = min(config.max_bad_steps, steps)
        self._engine = engine
        self._checkpoints = checkpoints
        self.bad_steps = 0

    def fault(
        self,
        updates: Sequence[Update],
        sampled: Sequence[ScoredGroup],
        metrics: Mapping[str, float],
    ) -> str:
        """Take a finished step; why the run has to stop, empty if it need not. A collective.

        Args:
            sampled: this rank's groups.
            metrics: the step's figures, over all ranks.
        """
        rewards = [r for group in sampled for r in group.rewards]
        counts = collectives.sum_named(
            {
                "completions": len(rewards),
                "scored": sum(math.isfinite(r.value) for r in rewards),
                "lost": sum(r.status in _LOST for r in rewards),
                "broken": float(not self._engine.finite()),
            }
        )
        reason = _taught_nothing(updates, counts)
        self.bad_steps = self.bad_steps + 1 if reason else 0
        if counts["broken"]:
            return "weights or optimizer states are not finite after the update"
        trained = sum(u.sums.tokens for u in updates)
        means = {"entropy/mean": trained, "loss/policy": trained, "reward/mean": counts["scored"]}
        for name, of in means.items():
            if of and not math.isfinite(metrics[name]):
                return f"{name} is {metrics[name]}"
        if any(not math.isfinite(u.measured_delta or 0.0) for u in updates):
            return "the entropy after the update is not finite"
        if reason and 0 < self._limit <= self.bad_steps:  # a resumed run may have a lower limit
            return f"{self.bad_steps} steps in a row taught nothing, the last because {reason}"
        return ""

    def stop(self, step: int, fault: str) -> None:
        """End the run for a fault, if there is one; a collective.

        Raises:
            PapoError: on every rank; the line has the last good checkpoint.
        """
        told = None
        if fault and collectives.rank() == 0:
            good = last_good(self._checkpoints)
            told = f"step {step}: {fault}; " + (
                "there is no good checkpoint to go back to"
                if good is None
                else f"the last good checkpoint is {good}: mend the cause, then go on with "
                f"--resume {good}"
            )
        collectives.raise_together(told)


def _taught_nothing(updates: Sequence[Update], counts: Mapping[str, float]) -> str:
    """Why a step taught nothing; empty if it did."""
    if counts["lost"] == counts["completions"]:
        return (
            f"no verifier gave one of its {counts['completions']:.0f} completions a verdict "
            "(errors and timeouts; the first are shown above)"
        )
    if not any(u.applied for u in updates):
        return f"its update was skipped: {updates[-1].reason}"
    return ""


def last_good(checkpoints: Path) -> Path | None:
    """The newest checkpoint to resume from that was not written while the run taught nothing."""
    for _, folder in reversed(completed(checkpoints)):
        with contextlib.suppress(PapoError):  # a damaged one is not good
            if read_manifest(folder).resumable and not read_trainer(folder).bad_steps:
                return folder
    return None
