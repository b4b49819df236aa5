"""Verifiable rewards in killable worker processes.

A verifier may hang in a regular expression, in sympy or in a user's own code; nothing but killing
its process ends that reliably, so every completion is scored in a worker with a deadline. A
verifier that raises or is late scores 0, one that answers None, NaN or an infinity masks its
completion; both are counted and never stop the run.

Workers are spawned, so they import this file and the program's main module: neither may import
torch at its top.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import signal
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as DeadlineError
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from papo.errors import PapoError
from papo.reward.verifiers import (
    BUILT_IN,
    COMPARING,
    SHOWN_CHARACTERS,
    Judge,
    Task,
    Verdict,
    judge,
    judge_reference,
    load_verifier,
)
from papo.types import Completion, Problem, Reward

if TYPE_CHECKING:
    from papo.config.data_options import RewardConfig

log = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)  # what a caller tells its tasks apart by

_SHOWN_IN_FULL = 3  # failures of each kind that are logged with their text
_POOL_STARTS = 3
_POLL_SECONDS = 0.5
_ORPHAN_SECONDS = 2.0


class BadReference(NamedTuple):
    """A problem whose reference answer is not right by its own verifier."""

    uid: int
    answer: str
    why: str


def _work(
    timeout_s: float, judged: Judge, verifier: str, how: str, threshold: float, task: Task
) -> Verdict:
    # The parent kills late workers. This ends them where the parent was killed itself.
    signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_SECONDS)
    try:
        return judged(verifier, how, threshold, task)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _prepare_worker(verifier: str) -> None:
    """Load the verifier before the first completion arrives; runs once in every new worker."""
    # Default actions end a worker stuck in C code, where a Python handler would never run.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        load_verifier(verifier)
        if verifier in ("reasoning_gym", "math_verify"):
            importlib.import_module(verifier)
    except Exception:  # every completion reports it; an initializer that fails would break the pool
        log.debug("verifier %r failed to load", verifier, exc_info=True)


class RewardPool:
    """Worker processes that score completions; a context manager.

    Workers start, and load the verifier, at construction. A worker past its deadline is killed and
    replaced, so hung verifiers never use the pool up. May be used from any thread, one at a time.

    Args:
        config: the config's `reward` section.
        verifier: name for `load_verifier` (`choose_verifier` turns `auto` into one).

    Attributes:
        counts: completions scored so far, by status.
        thinks: the prompts end with `<think>`, so that completions begin inside their thinking.

    Raises:
        PapoError: no such verifier.
    """

    def __init__(self, config: RewardConfig, verifier: str) -> None:
        load_verifier(verifier)
        self._config = config
        self._verifier = verifier
        self.thinks = False
        self.counts: Counter[str] = Counter()
        self._pool = self._start()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, whatever they are doing."""
        self._pool.stop()
        self._pool.join()

    def score(self, completions: Sequence[Completion]) -> list[Reward]:
        """One reward per completion, in order.

        Raises:
            PapoError: the workers themselves (not a verifier) die again and again.
        """
        tasks = {
            i: Task(c.text, c.problem.answer, self._metadata(c.problem), self.thinks)
            for i, c in enumerate(completions)
        }
        verdicts = self._judged(judge, tasks)
        self._report(tasks, verdicts)
        return [Reward(verdicts[i].value, verdicts[i].status) for i in tasks]

    def _metadata(self, problem: Problem) -> dict[str, Any]:
        """What the verifier reads of a problem besides its answer."""
        return {} if self._verifier in COMPARING else dict(problem.metadata)

    @property
    def knows_references(self) -> bool:
        """Whether a reference can be told from its verifier: a user's function need not take its
        reference for a completion, and is asked nothing."""
        return self._verifier in BUILT_IN

    def bad_references(self, problems: Sequence[Problem]) -> list[BadReference]:
        """The problems whose reference answer, given as a completion, would not score 1; for
        built-in verifiers.

        Raises:
            PapoError: as `score`.
        """
        compares = self._verifier in COMPARING  # the text alone, so that equal ones share a task
        keyed = [(p.answer if compares else p.uid, p) for p in problems]
        tasks = {key: Task("", p.answer, self._metadata(p)) for key, p in keyed}
        verdicts = self._judged(judge_reference, tasks)
        return [
            BadReference(p.uid, p.answer, verdicts[key].why)
            for key, p in keyed
            if verdicts[key].value != 1.0
        ]

    def _judged(self, judged: Judge, tasks: Mapping[Key, Task]) -> dict[Key, Verdict]:
        verdicts: dict[Key, Verdict] = {}
        for _ in range(_POOL_STARTS):
            left = {key: task for key, task in tasks.items() if key not in verdicts}
            verdicts |= self._run(judged, left)
            if len(verdicts) == len(tasks):
                return verdicts
            self.close()
            self._pool = self._start()
        raise PapoError(
            f"reward workers died {_POOL_STARTS} times before they could score: look at their "
            "messages above and at the machine's free memory, and try reward.workers=1"
        )

    def _start(self) -> ProcessPool:
        pool = ProcessPool(
            max_workers=self._config.workers,
            initializer=_prepare_worker,
            initargs=(self._verifier,),
            context=multiprocessing.get_context("spawn"),
        )
        _ = pool.active  # pebble starts its workers on first use
        return pool

    def _run(self, judged: Judge, tasks: Mapping[Key, Task]) -> dict[Key, Verdict]:
        """Verdicts of `tasks`; some are missing if the pool broke, say by a killed idle worker."""
        config = self._config
        rules = (config.timeout_s, judged, self._verifier, config.extract, config.threshold)
        futures: dict[ProcessFuture[Verdict], Key] = {}
        try:
            for key, task in tasks.items():
                args = (*rules, task)
                futures[self._pool.schedule(_work, args=args, timeout=config.timeout_s)] = key
        except RuntimeError:
            return {}
        pending: set[Future[Verdict]] = set(futures)
        # A broken pool forgets tasks it had not yet sent to a worker: their futures never finish.
        while pending and self._pool.active:
            pending = wait(pending, timeout=_POLL_SECONDS).not_done
        verdicts = {key: self._verdict(future) for future, key in futures.items() if future.done()}
        return {key: verdict for key, verdict in verdicts.items() if verdict is not None}

    def _verdict(self, future: ProcessFuture[Verdict]) -> Verdict | None:
        try:
            return future.result()
        except BrokenProcessPool:
            return None
        except DeadlineError:
            return Verdict(0.0, "timeout", f"no verdict within {self._config.timeout_s} s")
        except ProcessExpired as error:
            return Verdict(0.0, "error", f"the worker died with exit code {error.exitcode}")
        except Exception as error:  # such as metadata that cannot be pickled
            return Verdict(0.0, "error", f"{type(error).__name__}: {error}"[:SHOWN_CHARACTERS])

    def _report(self, tasks: Mapping[int, Task], verdicts: Mapping[int, Verdict]) -> None:
        unshown: Counter[str] = Counter()
        for i, task in tasks.items():
            status, why = verdicts[i].status, verdicts[i].why
            self.counts[status] += 1
            if status == "ok":
                continue
            if self.counts[status] > _SHOWN_IN_FULL:
                unshown[status] += 1
                continue
            log.warning(
                "reward %s: %s; answer %r, completion %r",
                status,
                why,
                task.answer,
                task.text[:SHOWN_CHARACTERS],
            )
        if unshown:
            log.warning(
                "rewards not scored normally: %s",
                ", ".join(f"{n} more {status}" for status, n in unshown.items()),
            )
