"""Ends a process together with everything that it has started. Standard library alone."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

MARKER = "PAPO_REWARD_WORKER"  # an environment variable, which all descendants inherit

_PROC = Path("/proc")
_PATIENCE_SECONDS = 5.0  # for processes to die, which takes microseconds unless a disk hangs
_PAUSE_SECONDS = 0.002


def family(marker: str) -> set[int]:
    """The living processes that were started with `marker` as the value of `MARKER`, and all of
    their descendants, whatever their session, group and environment. Empty without /proc."""
    wanted = f"{MARKER}={marker}".encode()
    parents: dict[int, int] = {}
    found: set[int] = set()
    for folder in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            # The name, in parentheses, may hold anything; the state and the parent follow it.
            state, parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            if state in (b"Z", b"X"):
                continue
            pid = int(folder.name)
            parents[pid] = int(parent)
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def kill_family(marker: str, groups: Iterable[int], *, spare: int | None = None) -> None:
    """Kill `family(marker)` but for the process `spare`, and return once all are dead.

    Args:
        groups: process groups to kill where there is no /proc.
    """
    if not (_PROC / "self" / "stat").exists():
        for group in groups:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        return
    until = time.monotonic() + _PATIENCE_SECONDS
    # Again and again, for a process may start another between the listing and its end.
    while (left := family(marker) - {spare}) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_SECONDS)
