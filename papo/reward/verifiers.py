"""Verifiers, and the verdict on one text: what reward workers do.

No torch here, for they import this file.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from papo.errors import PapoError
from papo.reward.answers import after_thinking, extract, for_sympy, latex, normalize, only_number
from papo.types import RewardStatus

Verifier = Callable[[str, str, Mapping[str, Any]], "float | None"]

_LARGEST = 3.4e38  # rewards are float32
SHOWN_CHARACTERS = 200  # of an exception's text, of a completion


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
    """1 where the answers are spelt alike or equal to sympy; the reference may be plain, LaTeX or
    boxed."""
    from math_verify import parse, verify

    gold, digits = _math_reference(answer)
    if normalize(text) == normalize(answer):
        return 1.0
    # Its own timeouts use SIGALRM, which works in the main thread only; the pool's replace them.
    found = parse(for_sympy(text), parsing_timeout=None)
    return float(verify(gold, found, float_rounding=digits, timeout_seconds=None))


@lru_cache(maxsize=8)
def _math_reference(answer: str) -> tuple[list[Any], int]:
    """What sympy makes of a reference, and the decimals to compare floats to: six, and below 0.1
    six significant digits, where six decimals would make small numbers equal to 0."""
    from math_verify import parse

    plain = latex(answer)
    delimited = any(mark in plain for mark in ("$", "\\boxed", "\\(", "\\["))
    gold = parse(plain if delimited else f"${plain}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"the reference answer {answer!r} cannot be parsed")
    size = abs(float(gold[0])) if getattr(gold[0], "is_Number", False) else 1.0
    lost = -math.floor(math.log10(size)) - 1 if 0.0 < size < math.inf else 0
    return gold, 6 + max(0, lost)


def _math_compares(answer: str) -> None:
    """Compare a reference with some other answer, as most completions will: a reference that sympy
    cannot evaluate hangs here, where a worker's deadline ends it."""
    from math_verify import parse, verify

    gold, digits = _math_reference(answer)
    verify(gold, parse("$7$", parsing_timeout=None), float_rounding=digits, timeout_seconds=None)


def _score_exact(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1 where the extracted text is the reference answer, number by value, other text as it is."""
    return float(normalize(text) == normalize(answer))


BUILT_IN: dict[str, Verifier] = {
    "reasoning_gym": _score_reasoning_gym,
    "math_verify": _score_math_verify,
    "exact": _score_exact,
}
COMPARING = ("math_verify", "exact")  # with the reference's text; reasoning-gym has its entry


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
    without a threshold; None or a value that is not finite masks it.

    Raises:
        PapoError: no such verifier, module or function.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        known = ", ".join(BUILT_IN)
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
    """What a worker gets of a completion; `thinks`: its prompt ends with `<think>`."""

    text: str
    answer: str
    metadata: dict[str, Any]
    thinks: bool = False


class Verdict(NamedTuple):
    """What comes back: the reward's value and status, and why where it is not `ok`."""

    value: float
    status: RewardStatus
    why: str = ""


Judge = Callable[[str, str, float, Task], Verdict]


def judge(verifier: str, how: str, threshold: float, task: Task) -> Verdict:
    """Score one completion; runs in a worker.

    Exceptions end here: one that cannot be unpickled in the parent would break the pool.
    """
    try:
        value = _value_of(verifier, how, threshold, task)
    except BaseException as error:  # asyncio's CancelledError and SystemExit are no Exceptions
        return Verdict(0.0, "error", f"{type(error).__name__}: {error}"[:SHOWN_CHARACTERS])
    if value is None or not abs(value) <= _LARGEST:
        return Verdict(math.nan, "invalid", f"the verifier returned {value}")
    return Verdict(value, "ok")


def _value_of(verifier: str, how: str, threshold: float, task: Task) -> float | None:
    built_in = verifier in BUILT_IN
    text: str | None = task.text
    if built_in or how != "none":  # a user's function may reward the thinking itself
        text = after_thinking(task.text, task.thinks)
    text = None if text is None else extract(text, how)
    if text is None:
        return 0.0
    answer = task.answer
    if verifier in COMPARING and how == "last_number":
        answer = only_number(answer)
    if verifier == "math_verify" and how in ("boxed", "last_number"):
        text = f"\\boxed{{{latex(text)}}}"  # bare LaTeX is not recognised as such
    score = load_verifier(verifier)(text, answer, task.metadata)
    if score is None:
        return None
    if not built_in or math.isnan(score):
        return float(score)
    return float(score > threshold)


def judge_reference(verifier: str, how: str, threshold: float, task: Task) -> Verdict:
    """Score `task.answer` as a completion that gives it the way `how` asks for; in a worker."""
    answer = task.answer
    if verifier == "reasoning_gym" and task.metadata["entry"]["answer"] is None:
        return Verdict(1.0, "ok")  # many answers are right, none is the reference
    if verifier in COMPARING and not normalize(answer):
        return Verdict(0.0, "ok", "it is empty")
    boxes = how == "boxed" or (verifier == "math_verify" and how in ("none", "last_line"))
    if boxes and "\n" in answer.strip() and "\\begin" not in answer:
        lines = len(answer.strip().splitlines())
        return Verdict(0.0, "ok", f"it has {lines} lines, as a solution has, not an answer")
    text = f"\\boxed{{{answer}}}" if boxes and "\\boxed" not in answer else answer
    if verifier == "math_verify":
        with contextlib.suppress(Exception):  # it is judged below, and says why
            _math_compares(answer)
    verdict = judge(verifier, how, threshold, task._replace(text=text))
    if verdict.status != "ok" or verdict.value == 1.0:
        return verdict._replace(why=verdict.why.removeprefix("ValueError: "))
    nothing = extract(text, how) is None
    why = f"reward.extract={how} finds nothing in it" if nothing else "it scores 0 against itself"
    return verdict._replace(why=why)
