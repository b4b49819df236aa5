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


def surrogate(text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    raise ValueError("\ud800")


EVIL = ["raises", "exits", "hangs", "leaves_children", "surrogate", "is_missing"]
