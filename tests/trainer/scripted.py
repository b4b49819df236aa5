"""Verifiers as a user would write them, that do what a test asks for.

No torch in this file: the pool's workers import it.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import sys
import time
from pathlib import Path


class NeedsTwoArguments(Exception):
    """Cannot be unpickled: pickle calls it with one argument."""

    def __init__(self, a, b):
        super().__init__(f"{a}{b}")


def scripted(text, answer, metadata):
    """Does what the completion says."""
    if "mark" in metadata:
        Path(metadata["mark"]).touch()
    if text == "hang":
        time.sleep(1e6)
    if text == "hang in C":  # catastrophic backtracking holds the interpreter lock
        re.match(r"(a+)+$", "a" * 60 + "b")
    if text == "die":
        os._exit(7)
    if text == "leave":
        sys.exit(3)
    if text == "cancel":
        raise asyncio.CancelledError
    if text == "raise":
        raise NeedsTwoArguments(1, 2)
    if text == "not a number":
        return "seven"
    if text.startswith("meet "):
        return _meet(*text.split()[1:])
    if text == "is torch loaded":
        return float("torch" in sys.modules)
    return {"none": None, "nan": math.nan, "inf": math.inf, "huge": 1e39}.get(
        text, metadata.get("value", 0.0)
    )


def equals(text, answer, metadata):
    """Whether the text is what the test expects to be seen."""
    return float(text == metadata["seen"])


def trl(prompts, completions, completion_ids, solution):
    """Whether the arguments have TRL's form, for the prompts `say 1` and, as messages, `say 2`."""
    (prompt,), (completion,), (answer,) = prompts, completions, solution
    if answer == "1":
        said = (prompt, completion) == ("say 1", "1")
    else:
        message = {"role": "assistant", "content": "2"}
        said = (prompt, completion) == ([{"role": "user", "content": "say 2"}], [message])
    return [float(said and completion_ids == [[7]])]


def _meet(here, other):
    """Returns only once two workers are in here at the same time."""
    Path(here).touch()
    while not Path(other).exists():
        time.sleep(0.01)
    return 1.0
