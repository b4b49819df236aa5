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
import json
import logging
import math
import multiprocessing
import re
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as DeadlineError
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from papo.errors import PapoError
from papo.types import Completion, Reward, RewardStatus

if TYPE_CHECKING:
    from papo.config import RewardConfig

log = logging.getLogger(__name__)

Verifier = Callable[[str, str, Mapping[str, Any]], "float | None"]

# A minus after a digit, a letter or a closing bracket is a subtraction, not a sign.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-\u2212])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+)?"
)
_SHOWN_IN_FULL = 3  # failures of each kind that are logged with their text
_SHOWN_CHARACTERS = 200
_POOL_STARTS = 3
_POLL_SECONDS = 0.5
_ORPHAN_SECONDS = 2.0


def extract(text: str, how: str) -> str | None:
    """The answer in a completion.

    `how` is `last_number`, `boxed` (the last one's argument), `last_line` or `none` (all of it).
    Numbers lose their thousands separators. None where there is no such part.

    Raises:
        ValueError: an unknown `how`.
    """
    if how == "none":
        return text.strip()
    if how == "last_line":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else None
    if how == "last_number":
        numbers = _NUMBER.findall(text)
        return numbers[-1].replace(",", "").replace("\u2212", "-") if numbers else None
    if how == "boxed":
        return _last_boxed(text)
    raise ValueError(f"how: expected last_number, boxed, last_line or none, got {how!r}")


def _last_boxed(text: str) -> str | None:
    opening = "\\boxed{"
    start = text.rfind(opening)
    if start < 0:
        return None
    begin, depth = start + len(opening), 1
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i].strip()
    return None


@lru_cache(maxsize=8)
def _reasoning_gym_dataset(name: str, params: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(params))


def _score_reasoning_gym(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """reasoning-gym's own score, which may give partial credit and depend on the parameters.

    `metadata` has the `dataset`'s name, its `params` and the problem's `entry`.
    """
    params = json.dumps(metadata["params"], sort_keys=True)
    dataset = _reasoning_gym_dataset(metadata["dataset"], params)
    return float(dataset.score_answer(text, metadata["entry"]))


def _score_math_verify(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1 where the answers are equal to sympy; the reference may be plain, LaTeX or boxed."""
    from math_verify import parse, verify

    # Its own timeouts use SIGALRM, which works in the main thread only; the pool's replace them.
    is_math = "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer
    gold = parse(answer if is_math else f"${answer}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"the reference answer {answer!r} cannot be parsed")
    return float(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None))


def _score_exact(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1 where the extracted text is the reference answer, character for character."""
    return float(text.strip() == answer.strip())


_BUILT_IN: dict[str, Verifier] = {
    "reasoning_gym": _score_reasoning_gym,
    "math_verify": _score_math_verify,
    "exact": _score_exact,
}


def choose_verifier(name: str, source: str) -> str:
    """The verifier `auto` stands for: the data source's own."""
    if name != "auto":
        return name
    return "reasoning_gym" if source == "reasoning_gym" else "math_verify"


@lru_cache(maxsize=8)
def load_verifier(name: str) -> Verifier:
    """A built-in verifier, or the user's `package.module:function`.

    The user's function is called as `function(text, answer, metadata)`: the extracted part of the
    completion, the reference answer and the problem's metadata. Its value is the reward as it is,
    without a threshold; None or NaN masks the completion.

    Raises:
        PapoError: no such verifier, module or function.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        known = ", ".join(_BUILT_IN)
        raise PapoError(
            f"reward.verifier={name!r}: expected auto, {known}, or package.module:function"
        )
    try:
        verifier = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise PapoError(f"reward.verifier={name!r}: {error}") from error
    if not callable(verifier):
        raise PapoError(
            f"reward.verifier={name!r}: {attribute} is a {type(verifier).__name__}, not a function"
        )
    found: Verifier = verifier
    return found


class Task(NamedTuple):
    """What a worker gets of a completion."""

    text: str
    answer: str
    metadata: dict[str, Any]


class Verdict(NamedTuple):
    """What comes back: the reward's value and status, and why where it is not `ok`."""

    value: float
    status: RewardStatus
    why: str = ""


def judge(verifier: str, how: str, threshold: float, task: Task) -> Verdict:
    """Score one completion; runs in a worker.

    Exceptions end here: one that cannot be unpickled in the parent would break the pool.
    """
    try:
        value = _value_of(verifier, how, threshold, task)
    except (Exception, SystemExit) as error:
        return Verdict(0.0, "error", f"{type(error).__name__}: {error}"[:_SHOWN_CHARACTERS])
    if value is None or not math.isfinite(value):
        return Verdict(math.nan, "invalid", f"the verifier returned {value}")
    return Verdict(value, "ok")


def _value_of(verifier: str, how: str, threshold: float, task: Task) -> float | None:
    text = extract(task.text, how)
    if text is None:
        return 0.0
    if verifier == "math_verify" and how == "boxed":
        text = f"\\boxed{{{text}}}"  # bare LaTeX is not recognised as such
    score = load_verifier(verifier)(text, task.answer, task.metadata)
    if score is None:
        return None
    if verifier not in _BUILT_IN or math.isnan(score):
        return float(score)
    return float(score > threshold)


def _work(timeout_s: float, verifier: str, how: str, threshold: float, task: Task) -> Verdict:
    # The parent kills late workers. This ends them where the parent was killed itself.
    signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_SECONDS)
    try:
        return judge(verifier, how, threshold, task)
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

    Raises:
        PapoError: no such verifier.
    """

    def __init__(self, config: RewardConfig, verifier: str) -> None:
        load_verifier(verifier)
        self._config = config
        self._verifier = verifier
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
            i: Task(c.text, c.problem.answer, dict(c.problem.metadata))
            for i, c in enumerate(completions)
        }
        verdicts: dict[int, Verdict] = {}
        for _ in range(_POOL_STARTS):
            verdicts |= self._run({i: task for i, task in tasks.items() if i not in verdicts})
            if len(verdicts) == len(tasks):
                self._report(tasks, verdicts)
                return [Reward(verdicts[i].value, verdicts[i].status) for i in tasks]
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

    def _run(self, tasks: Mapping[int, Task]) -> dict[int, Verdict]:
        """Verdicts of `tasks`; some are missing if the pool broke, say by a killed idle worker."""
        config = self._config
        futures: dict[ProcessFuture[Verdict], int] = {}
        try:
            for i, task in tasks.items():
                args = (config.timeout_s, self._verifier, config.extract, config.threshold, task)
                futures[self._pool.schedule(_work, args=args, timeout=config.timeout_s)] = i
        except RuntimeError:
            return {}
        pending: set[Future[Verdict]] = set(futures)
        # A broken pool forgets tasks it had not yet sent to a worker: their futures never finish.
        while pending and self._pool.active:
            pending = wait(pending, timeout=_POLL_SECONDS).not_done
        verdicts = {i: self._verdict(future) for future, i in futures.items() if future.done()}
        return {i: verdict for i, verdict in verdicts.items() if verdict is not None}

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
            return Verdict(0.0, "error", f"{type(error).__name__}: {error}"[:_SHOWN_CHARACTERS])

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
                task.text[:_SHOWN_CHARACTERS],
            )
        if unshown:
            log.warning(
                "rewards not scored normally: %s",
                ", ".join(f"{n} more {status}" for status, n in unshown.items()),
            )
