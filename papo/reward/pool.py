"""Verifiable rewards in killable worker processes.

A verifier may hang in a regular expression, in sympy or in a user's own code. Only killing its
process ends that reliably, so every completion is scored in a worker with a deadline. A verifier
that raises or is late scores 0; one that returns None, NaN or an infinity masks its completion.
Both are counted, and neither stops the run.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from papo.errors import PapoError, shown
from papo.reward.functions import SHOWN_CHARACTERS
from papo.reward.judge import LARGEST_REWARD, Judge, Task, Verdict
from papo.reward.verifiers import COMPARING
from papo.reward.workers import Workers
from papo.types import Completion, Problem, Reward, RewardStatus

if TYPE_CHECKING:
    from papo.config import RewardConfig

log = logging.getLogger(__name__)

_SHOWN_IN_FULL = 3  # failures of each kind that are logged with their text


class BadReference(NamedTuple):
    """A problem whose reference answer its own verifier does not score 1."""

    uid: int
    answer: str
    why: str


class RewardPool:
    """Worker processes that score completions; a context manager.

    Workers start, and load the verifiers, at construction; the user's functions have then been
    loaded. A worker past its deadline is killed and replaced, so hung verifiers never use the pool
    up. May be used from any thread, one at a time.

    Args:
        config: the config's `reward` section.
        verifiers: names for `load_verifier` (`RewardConfig.chosen` turns `auto` into one).
        answer_field: the name of the rows' field that references come from.

    Attributes:
        counts: verdicts on completions so far, by status.
        thinks: the prompts end with `<think>`, so that completions begin inside their thinking.

    Raises:
        PapoError: no such verifier, or a user's function cannot be loaded.
    """

    def __init__(
        self, config: RewardConfig, verifiers: Sequence[str], answer_field: str = "answer"
    ) -> None:
        self._config = config
        self._judges = [Judge(name, config.extract, config.threshold) for name in verifiers]
        self._answer_field = answer_field
        self.thinks = False
        self.counts: Counter[str] = Counter()
        self._workers: Workers[Any] = Workers(config.workers, self._judges, config.memory_mib)
        if all(judge.is_built_in for judge in self._judges):
            return  # they load while other things happen
        try:
            self._workers.load()
        except PapoError:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they are doing, and all that they have started."""
        self._workers.close()

    def score(self, completions: Sequence[Completion]) -> list[Reward]:
        """One reward per completion, in order: the weighted sum over the verifiers that returned a
        number.

        Raises:
            PapoError: workers cannot be started any more.
        """
        tasks = {
            (i, k): (k, self._task(completion, judge))
            for i, completion in enumerate(completions)
            for k, judge in enumerate(self._judges)
        }
        verdicts = self._workers.run(tasks, self._config.timeout_s)
        self._report(tasks, verdicts)
        each = range(len(self._judges))
        return [self._reward([verdicts[i, k] for k in each]) for i in range(len(completions))]

    def _reward(self, verdicts: Sequence[Verdict]) -> Reward:
        weights = self._config.weights or [1.0] * len(verdicts)
        parts = {j.verifier: v.value for j, v in zip(self._judges, verdicts, strict=True)}
        terms = [
            w * v.value for w, v in zip(weights, verdicts, strict=True) if v.status != "invalid"
        ]
        value = math.fsum(terms) if terms else math.nan
        if not abs(value) <= LARGEST_REWARD:
            return Reward(math.nan, "invalid", parts)
        found = {v.status for v in verdicts}
        order: tuple[RewardStatus, ...] = ("error", "timeout", "ok")
        return Reward(value, next(status for status in order if status in found), parts)

    def _task(self, completion: Completion, judge: Judge) -> Task:
        problem = completion.problem
        task = Task(completion.text, problem.answer, self._metadata(problem, judge), self.thinks)
        if judge.is_built_in:
            return task
        messages = list(problem.messages)
        return task._replace(
            prompt=messages if problem.conversational or not messages else messages[-1]["content"],
            completion_ids=completion.response_ids,
            answer_field=self._answer_field,
        )

    def _metadata(self, problem: Problem, judge: Judge) -> dict[str, Any]:
        """What the verifier reads of a problem besides its answer."""
        return {} if judge.verifier in COMPARING else dict(problem.metadata)

    @property
    def knows_references(self) -> bool:
        """Whether references can be checked, by a built-in verifier."""
        return any(judge.is_built_in for judge in self._judges)

    def bad_references(self, problems: Sequence[Problem]) -> list[BadReference]:
        """The problems whose reference answer, given as a completion, would not score 1 with every
        built-in verifier.

        Raises:
            PapoError: as `score`.
        """
        tasks: dict[tuple[int, str | int], tuple[int, Task]] = {}
        asked: dict[int, list[tuple[int, str | int]]] = {p.uid: [] for p in problems}
        for k, judge in enumerate(self._judges):
            if not judge.is_built_in:
                continue
            for p in problems:
                # Only the text counts where verifiers compare, so equal references share a task.
                key = (k, p.answer if judge.verifier in COMPARING else p.uid)
                tasks[key] = (k, Task(None, p.answer, self._metadata(p, judge)))
                asked[p.uid].append(key)
        verdicts = self._workers.run(tasks, self._config.timeout_s)
        found = ((p, [verdicts[key] for key in asked[p.uid]]) for p in problems)
        return [
            BadReference(p.uid, p.answer, next(v.why for v in given if v.value != 1.0))
            for p, given in found
            if any(v.value != 1.0 for v in given)
        ]

    def _report(
        self,
        tasks: Mapping[tuple[int, int], tuple[int, Task]],
        verdicts: Mapping[tuple[int, int], Verdict],
    ) -> None:
        unshown: Counter[str] = Counter()
        for key, (judge, task) in tasks.items():
            status, why = verdicts[key].status, verdicts[key].why
            self.counts[status] += 1
            if status == "ok":
                continue
            if self.counts[status] > _SHOWN_IN_FULL:
                unshown[status] += 1
                continue
            log.warning(
                "reward %s by %s: %s; answer %s, completion %s",
                status,
                self._judges[judge].verifier,
                why,
                shown(task.answer),
                shown(task.text, SHOWN_CHARACTERS),
            )
        if unshown:
            log.warning(
                "rewards not scored normally: %s",
                ", ".join(f"{n} more {status}" for status, n in unshown.items()),
            )
