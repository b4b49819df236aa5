"""Verifiers that do what a user's may do at worst."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from typing import Any


def raises(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    raise ValueError("no verdict")


def exits(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    os._exit(3)


def hangs(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    while True:
        time.sleep(60)


def leaves_children(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    subprocess.Popen(["sleep", "600"])
    return 1.0


def leaves_a_daemon(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    if os.fork() == 0:
        subprocess.Popen(["sleep", "600"], env={}, start_new_session=True)
        os._exit(0)
    os.wait()
    return 0.5


def surrogate(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    raise ValueError("\ud800")


EVIL = ["raises", "exits", "hangs", "leaves_children", "leaves_a_daemon", "surrogate"]

# Name, text, and a part of the one line that refuses it.
EVIL_MODULES = {
    "is_no_python": ("def f(:", "SyntaxError: "),
    "lacks_it": ("", "module 'lacks_it' has no attribute 'f'"),
}
