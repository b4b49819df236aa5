"""Answers as text: where a completion's answer stands, and which spellings of it are the same.

Reference and completion pass the same functions; docs/rewards.md lists what they treat as equal. No
torch here: reward workers import this file.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|(?<![0-9.\w])\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
# Not in a path, a date or a longer fraction. A space makes a mixed number: `3 1/2`.
_FRACTION = r"(?<![\w./])(?:[0-9]+ )?[0-9]+ ?/ ?[0-9]+(?![\w/]|[.,][0-9])"
# A minus after a digit, a letter or a closing bracket is a subtraction, not a sign.
_NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])-[$€£]?)?(?:{_FRACTION}|{_DECIMAL})")
_EN_DASH_AS_MINUS = re.compile(r"(?<![\w.)\]}])\u2013(?=[$€£]?[.0-9])")
_MIXED = re.compile(r"([-+]?[0-9]+) ([0-9]+)/([0-9]+)")
_SIGNED_FRACTION = re.compile(rf"[-+]?{_FRACTION}")
# Leading zeros make it text: they tell `0101` from `101`.
_WHOLE_NUMBER = re.compile(
    rf"(?:(?P<sign>[-+])?\$?|\$(?P<inner_sign>[-+]))(?P<digits>(?!0[0-9]){_DECIMAL})"
    r"\.?\s?(?:\\?%|\$)?\.?"
)
# A float as JSON and Python print it, standing alone: `1e - 5` and `2e-3x` are expressions.
_FLOAT = re.compile(
    r"(?<![\w.^)\]}+\-*/])[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"[eE][-+]?[0-9]+(?![-+*/\w^{(]|\.[0-9])"
)
_LARGEST_EXPONENT = 400  # a number beyond stays as it is written
_SEPARATOR = re.compile(
    r"(?<=[0-9])(?:\{,\}|,\\!|\\[,!:; ]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))"
)
_LATEX_FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9])([0-9])(?![0-9]))"
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$([^$]+)\$\$",
        r"\$([^$]+)\$",
        r"\\\(((?:(?!\\\)).)+)\\\)",
        r"\\\[((?:(?!\\\]).)+)\\\]",
        r"\\(?:text|textbf|textrm|mathrm|mathbf)\s*\{([^{}]+)\}",
        r"\*\*([^*]+)\*\*",
    )
]
_SAME_IN_LATEX = [
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![A-Za-z])"), ""),
    # Spaces, but for those between digits.
    (re.compile(r"(?<!\\)(?:(?<![0-9])\\[!,;: ]|\\[!,;: ](?![0-9]))"), ""),
    (re.compile(r"(?<!\\)\\%"), "%"),
]
# Around the number of a reference these say that it is part of a formula.
_FORMULA = re.compile(r"[\^_+*/\\{}<>!|\u221a-]")


def after_thinking(text: str, opened: bool = False) -> str | None:
    """What a completion says after its thinking; None where the thinking does not end.

    Args:
        opened: the prompt ends with `<think>`, so that the completion need not hold it.
    """
    _, end, rest = text.rpartition("</think>")
    return None if "<think>" in rest or (opened and not end) else rest


def extract(text: str, how: str) -> str | None:
    """The answer in a text.

    `how` is `last_number`, `boxed` (the last box's content), `last_line` or `none` (all of it).
    With `last_number`, thousands separators go and LaTeX fractions of whole numbers become `a/b`.
    None where there is no such part.

    Raises:
        ValueError: an unknown `how`.
    """
    if how == "none":
        return text.strip()
    if how == "last_line":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else None
    if how == "last_number":
        numbers = _NUMBER.findall(_with_fractions(_with_ascii_numbers(text)))
        return _bare(numbers[-1]) if numbers else None
    if how == "boxed":
        found = _boxes(text)
        return found[-1][2] if found else None
    raise ValueError(f"how: expected last_number, boxed, last_line or none, got {how!r}")


def only_number(answer: str) -> str:
    """The one number of a reference answer, as `extract` with `last_number` finds it.

    Words, a currency and a percent sign may stand around it.

    Raises:
        ValueError: it holds no number, several, or one that is part of a formula.
    """
    text = _with_fractions(_with_ascii_numbers(_unwrapped(answer)).replace("\\%", "%")).lstrip("+")
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        count = len(found) or "no"
        raise ValueError(f"it holds {count} numbers, reward.extract=last_number compares one")
    before, after = text[: found[0].start()], text[found[0].end() :]
    if _FORMULA.search(before + after) or before[-1:].isalpha() or after[:1].isalpha():
        raise ValueError("its number is part of a formula, reward.extract=last_number compares one")
    return _bare(found[0].group())


def normalize(text: str) -> str:
    """The one spelling of all that `exact` treats as equal.

    Numbers are written positionally, without separators, trailing zeros, dollar and percent signs.
    Other text loses what surrounds it (spaces, dollar signs, a box, `\\text{}`, `**`) and LaTeX's
    variants of spacing and fractions; it keeps case, inner spaces and line breaks.
    """
    text = _with_ascii_numbers(text)
    if "\\" in text:
        for pattern, replacement in _SAME_IN_LATEX:
            text = pattern.sub(replacement, text)
    text = _unwrapped(text)
    number = _WHOLE_NUMBER.fullmatch(text)
    if number:
        sign = number["sign"] or number["inner_sign"] or ""
        return positional(sign + number["digits"].replace(",", ""))
    fraction = _with_fractions(text).removesuffix(".")
    if _SIGNED_FRACTION.fullmatch(fraction):
        return _bare(fraction).lstrip("+")
    return text


def for_sympy(text: str) -> str:
    """Prose with its numbers and boxes as math-verify understands them."""
    text = _sympy_numbers(text)
    parts, end = [], 0
    for start, stop, content in _boxes(text):
        if start < end or content is None:  # inside the one before, or not closed
            continue
        parts += [text[end:start], f"\\boxed{{{_formula(content)}}}"]
        end = stop
    return "".join([*parts, text[end:]])


def latex(answer: str) -> str:
    """A text that is an answer and nothing else, as math-verify understands it between dollars."""
    return _formula(_sympy_numbers(answer))


def _formula(text: str) -> str:
    text = _unwrapped(text)
    if _WHOLE_NUMBER.fullmatch(text):
        text = text.replace("$", "").lstrip("+")
    text = text.removesuffix(".")
    return _MIXED.sub(r"\1\\frac{\2}{\3}", text) if _MIXED.fullmatch(text) else text


def _sympy_numbers(text: str) -> str:
    text = _FLOAT.sub(lambda match: positional(match.group()), _with_ascii_numbers(text))
    return re.sub(r"(?<![\w.])\.(?=[0-9])", "0.", text)


def _bare(number: str) -> str:
    """Without thousands separators and currency, and a fraction without spaces about its slash."""
    return re.sub(r" ?/ ?", "/", re.sub(r"[,$€£]", "", number))


def _with_ascii_numbers(text: str) -> str:
    """Minus signs and thousands separators as a keyboard has them; escaped dollars are no part of
    an answer."""
    text = _EN_DASH_AS_MINUS.sub("-", text.replace("\u2212", "-"))
    return _SEPARATOR.sub(",", re.sub(r"(?<!\\)\\\$", "", text))


def _with_fractions(text: str) -> str:
    def spelt(match: re.Match[str]) -> str:
        top, bottom = (match[1], match[2]) if match[1] else (match[3], match[4])
        apart = " " if re.match(r"[\w)}\]]", text[match.start() - 1 : match.start()]) else ""
        return f"{apart}{top}/{bottom}"

    return _LATEX_FRACTION.sub(spelt, text)


def positional(number: str) -> str:
    """A decimal without exponent and trailing zeros, by exact arithmetic."""
    try:
        value = Decimal(number)
    except InvalidOperation:  # its exponent is beyond a decimal's
        return number
    if abs(value.adjusted()) > _LARGEST_EXPONENT:
        return number
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if value == 0 else text


def _unwrapped(text: str) -> str:
    """`text` without what surrounds all of it: spaces, delimiters, a box, `\\text{}`, `**`."""
    before = None
    while text != before:
        before, text = text, text.strip()
        matches = (pattern.fullmatch(text) for pattern in _WRAPPERS)
        text = next((match[1] for match in matches if match), text)
        boxes = _boxes(text)
        if boxes and boxes[0][:2] == (0, len(text)) and boxes[0][2] is not None:
            text = boxes[0][2]
    return text


def _boxes(text: str) -> list[tuple[int, int, str | None]]:
    """Start, end and content of every box, in order; content None where one is not closed."""
    found: list[tuple[int, int, str | None]] = []
    closing: dict[int, int] | None = None
    for match in _BOX.finditer(text):
        begin = match.end()
        if text[begin : begin + 1] == "{":
            closing = _closing_braces(text) if closing is None else closing
            end = closing.get(begin)
            content = None if end is None else text[begin + 1 : end].strip()
            found.append((match.start(), len(text) if end is None else end + 1, content))
        else:  # `\boxed 5`
            word = re.split(r"[\s$]", text[begin:], maxsplit=1)[0].rstrip(".,;:")
            found.append((match.start(), begin + len(word), word or None))
    return found


def _closing_braces(text: str) -> dict[int, int]:
    """Where each brace that is closed is closed; escaped ones are text."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in _BRACE.finditer(text):
        if match.group() == "{":
            opened.append(match.start())
        elif match.group() == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing
