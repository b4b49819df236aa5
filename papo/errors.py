"""The one error that a user is meant to read: what is wrong, with which value, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_LONGEST_MESSAGE = 500
_LONGEST_VALUE = 80
_LONGEST_PATH = 240


class PapoError(Exception):
    """A failure explained in one printable line; without a traceback, from rank 0 only."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, _LONGEST_MESSAGE))


def printable(text: str, longest: int = _LONGEST_VALUE) -> str:
    """`text` on one line of at most `longest` characters.

    Line breaks become spaces. Control characters and halves of surrogate pairs are escaped, and
    what is too long loses its middle: the advice stands at the end.
    """
    if len(text) > 2 * longest:  # every character is kept, or becomes several
        text = _cut(text, 2 * longest)
    escaped = one_line(text)
    return escaped if len(escaped) <= longest else _cut(escaped, longest)


def one_line(text: str) -> str:
    """`text` on one line, and without characters that a terminal would obey."""
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _cut(text: str, longest: int) -> str:
    head = (longest - 3) * 2 // 3
    return f"{text[:head]}...{text[-(longest - 3 - head) :]}"


def shown_path(path: Path | str) -> str:
    """A path as `printable` text, whole unless it is very long."""
    return printable(str(path), _LONGEST_PATH)


def shown(value: object, longest: int = _LONGEST_VALUE) -> str:
    """Any value as a user may have written it, on one line of at most `longest` characters."""
    if isinstance(value, str) and len(value) > longest:
        value = _cut(value, longest)
    try:
        text = repr(value)
    except Exception:  # nested too deeply, an integer of too many digits
        text = f"<{type(value).__name__}>"
    return printable(text, longest)


def first_line(error: BaseException) -> str:
    """The first line of the error's text that is not blank, or its type's name if there is none."""
    try:
        lines = [line.strip() for line in str(error).splitlines()]
    except Exception:  # an error may hold anything
        lines = []
    return next((line for line in lines if line), type(error).__name__)


def listed(names: Sequence[str], shown: int) -> str:
    """The first `shown` names on one line, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
