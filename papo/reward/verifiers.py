"""Verifiers: functions of an answer, the reference answer and metadata that return a score.

No torch here: reward workers import this file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from papo.reward.answers import for_sympy, latex, normalize

Verifier = Callable[[str, str, Mapping[str, Any]], "float | None"]


@lru_cache(maxsize=8)
def _reasoning_gym_dataset(name: str, params: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(params))


def _score_reasoning_gym(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """reasoning-gym's own score, which may give partial credit and may depend on the parameters.

    `metadata` has the `dataset`'s name, its `params` and the problem's `entry`.
    """
    params = json.dumps(metadata["params"], sort_keys=True)
    dataset = _reasoning_gym_dataset(metadata["dataset"], params)
    return float(dataset.score_answer(text, metadata["entry"]))


def _score_math_verify(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1 where the answers are spelled alike or equal to sympy; the reference may be plain, LaTeX or
    boxed."""
    from math_verify import parse, verify

    gold, digits = _math_reference(answer)
    if normalize(text) == normalize(answer):
        return 1.0
    # Its own timeouts use SIGALRM, which works in the main thread alone; the pool's replace them.
    found = parse(for_sympy(text), parsing_timeout=None)
    return float(verify(gold, found, float_rounding=digits, timeout_seconds=None))


@lru_cache(maxsize=8)
def _math_reference(answer: str) -> tuple[list[Any], int]:
    """What sympy makes of a reference, and the number of decimals to compare floats to.

    Six decimals, or six significant digits below 0.1, where six decimals would make small numbers
    equal to 0.
    """
    from math_verify import parse

    plain = latex(answer)
    delimited = any(mark in plain for mark in ("$", "\\boxed", "\\(", "\\["))
    gold = parse(plain if delimited else f"${plain}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"the reference answer {answer!r} cannot be parsed")
    size = abs(float(gold[0])) if getattr(gold[0], "is_Number", False) else 1.0
    lost = -math.floor(math.log10(size)) - 1 if 0.0 < size < math.inf else 0
    return gold, 6 + max(0, lost)


def compare_math(answer: str) -> None:
    """Compare a reference with another answer, as most completions make math-verify do.

    A reference that sympy cannot evaluate hangs here, where a worker's deadline ends it.
    """
    from math_verify import parse, verify

    gold, digits = _math_reference(answer)
    verify(gold, parse("$7$", parsing_timeout=None), float_rounding=digits, timeout_seconds=None)


def _score_exact(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """1 where the extracted text is the reference answer: numbers by value, other text as it is."""
    return float(normalize(text) == normalize(answer))


BUILT_IN: dict[str, Verifier] = {
    "reasoning_gym": _score_reasoning_gym,
    "math_verify": _score_math_verify,
    "exact": _score_exact,
}
# These compare with the reference answer's text; reasoning-gym reads its entry instead.
COMPARING = ("math_verify", "exact")
