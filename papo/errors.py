"""The one error that a user is meant to read: what is wrong, with which value, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class PapoError(Exception):
    """A failure explained in one line; printed without a traceback, from rank 0 only."""


def first_line(error: BaseException) -> str:
    """The first line of the error's text that is not blank, or its type's name if there is none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def one_line(text: str) -> str:
    """`text` for a screen: on one line, and without characters that a terminal would obey."""
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def listed(names: Sequence[str], shown: int) -> str:
    """The first `shown` names on one line, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
