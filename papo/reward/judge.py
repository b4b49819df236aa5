"""From a completion to a verdict: which part of it the verifier sees, and what its score means.

No torch here: reward workers import this file.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from papo.reward.answers import after_thinking, extract, latex, normalize, only_number
from papo.reward.functions import Task, described, load_verifier
from papo.reward.verifiers import BUILT_IN, COMPARING, compare_math
from papo.types import RewardStatus

LARGEST_REWARD = 1e18  # its square, and sums of squares, are float32 numbers


class Verdict(NamedTuple):
    """A worker's answer: the reward's value and status, and the reason where it is not plain."""

    value: float
    status: RewardStatus
    why: str = ""

    @classmethod
    def failed(cls, error: BaseException) -> Verdict:
        """The verdict where `error` prevented one."""
        return cls(0.0, "error", described(error))


@dataclass(frozen=True)
class Judge:
    """Turns tasks into verdicts. It is sent to the workers, so it can be pickled.

    Attributes:
        verifier: name for `load_verifier`.
        extract: `reward.extract`, the part of a completion that the verifier sees.
        threshold: `reward.threshold`, above which the score of a built-in verifier is a success.
    """

    verifier: str
    extract: str
    threshold: float

    @property
    def is_built_in(self) -> bool:
        """Whether it knows references: a user's function need not take its reference for a
        completion."""
        return self.verifier in BUILT_IN

    def load(self) -> None:
        """Import what the verifier needs.

        Raises:
            PapoError: as `load_verifier`.
        """
        load_verifier(self.verifier)

    def verdict(self, task: Task) -> Verdict:
        """Score a completion, or check a reference; runs in a worker."""
        return self._of_reference(task) if task.text is None else self._of(task.text, task)

    def _of(self, text: str, task: Task) -> Verdict:
        # Exceptions end here: one that cannot be unpickled in the parent would break the pool.
        try:
            value = self._value(text, task)
        except BaseException as error:  # CancelledError of asyncio and SystemExit are no Exceptions
            return Verdict.failed(error)
        if value is None or not abs(value) <= LARGEST_REWARD:
            return Verdict(math.nan, "invalid", f"the verifier returned {value}")
        return Verdict(value, "ok")

    def _value(self, text: str, task: Task) -> float | None:
        said: str | None = text
        # A user's function may reward the thinking itself.
        if self.is_built_in or self.extract != "none":
            said = after_thinking(text, task.thinks)
        found = None if said is None else extract(said, self.extract)
        if found is None:
            return 0.0
        answer = task.answer
        if self.verifier in COMPARING and self.extract == "last_number":
            answer = only_number(answer)
        if self.verifier == "math_verify" and self.extract in ("boxed", "last_number"):
            found = f"\\boxed{{{latex(found)}}}"  # math-verify does not recognize bare LaTeX
        score = _number(load_verifier(self.verifier)(found, task._replace(answer=answer)))
        if score is None or math.isnan(score) or not self.is_built_in:
            return score
        return float(score > self.threshold)

    def _of_reference(self, task: Task) -> Verdict:
        """Score the reference answer as a completion that gives it in the form `extract` asks
        for."""
        answer, how = task.answer, self.extract
        if self.verifier == "reasoning_gym" and task.metadata["entry"]["answer"] is None:
            return Verdict(1.0, "ok")  # many answers are right, none is the reference
        if self.verifier in COMPARING and not normalize(answer):
            return Verdict(0.0, "ok", "it is empty")
        boxes = how == "boxed" or (self.verifier == "math_verify" and how in ("none", "last_line"))
        if boxes and "\n" in answer.strip() and "\\begin" not in answer:
            lines = len(answer.strip().splitlines())
            return Verdict(
                0.0, "ok", f"it has {lines} lines, like a solution rather than an answer"
            )
        text = f"\\boxed{{{answer}}}" if boxes and "\\boxed" not in answer else answer
        if self.verifier == "math_verify":
            with contextlib.suppress(Exception):  # the verdict below says why
                compare_math(answer)
        verdict = self._of(text, task)
        if verdict.status != "ok" or verdict.value == 1.0:
            return verdict._replace(why=verdict.why.removeprefix("ValueError: "))
        if extract(text, how) is None:
            return verdict._replace(why=f"reward.extract={how} finds nothing in it")
        return verdict._replace(why="it scores 0 against itself")


def _number(score: Any) -> float | None:
    """What a verifier returned as a float; an infinity where none is large enough.

    Raises:
        TypeError: it is no number.
    """
    if score is None:
        return None
    if isinstance(score, (str, bytes, bytearray)):
        raise TypeError(f"the verifier returned {type(score).__name__}, expected a number or None")
    try:
        return float(score)
    except OverflowError:
        return math.inf
