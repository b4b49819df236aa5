"""When to save and leave before the end: SIGTERM, or a launcher that is gone."""

from __future__ import annotations

import os
import signal
import threading

import psutil

_LAUNCHER = "deepspeed.launcher.launch"


class Termination:
    """Watches for both from the moment it is made, which must be in the main thread."""

    def __init__(self) -> None:
        self._signalled = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self._signalled.set())
        self._command = _deepspeed_command()

    @property
    def reason(self) -> str:
        """Why to leave, empty where there is no reason to."""
        if self._signalled.is_set():
            return "SIGTERM"
        if self._command is not None and not self._command.is_running():
            return "the deepspeed command is gone"
        return ""


def _deepspeed_command() -> psutil.Process | None:
    """The `deepspeed` process behind the launcher that started this rank, if one did.

    It does not forward signals: if it is terminated, the ranks would go on training unnoticed.
    """
    try:
        launcher = psutil.Process(os.getppid())
        return launcher.parent() if _LAUNCHER in launcher.cmdline() else None
    except psutil.Error:
        return None
