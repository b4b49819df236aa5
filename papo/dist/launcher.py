"""DeepSpeed's launcher, which starts a machine's ranks and waits for them."""

from __future__ import annotations

import os
import subprocess

import psutil

_MODULE = "deepspeed.launcher.launch"
# The pipe's end of file is the one sign of a rank's end that no way of leaving can forget.
_HOLD = 'trap "" HUP INT TERM; kill -STOP "$0"; echo held; read -r _; kill -CONT "$0"'


class Launcher:
    """The process that started this rank, and the `deepspeed` command that started it.

    The command does not forward signals: were it terminated, the ranks would go on unnoticed.
    """

    def __init__(self, process: psutil.Process, command: psutil.Process | None) -> None:
        self.process = process
        self._command = command
        self._guard: subprocess.Popen[bytes] | None = None

    @classmethod
    def find(cls) -> Launcher | None:
        """This rank's launcher, None where something else started it."""
        try:
            process = psutil.Process(os.getppid())
            return cls(process, process.parent()) if _MODULE in process.cmdline() else None
        except psutil.Error:
            return None

    @property
    def gone(self) -> str:
        """What of it is gone, empty where nothing is."""
        if self._command is not None and not is_alive(self._command):
            return "the deepspeed command is gone"
        return "" if is_alive(self.process) else "the deepspeed launcher is gone"

    def hold(self) -> None:
        """Suspend it until this process has ended.

        30 seconds after a signal it would kill ranks whose step may take minutes.
        """
        self._guard = subprocess.Popen(
            ["sh", "-c", _HOLD, str(self.process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._guard.stdout is not None
        self._guard.stdout.readline()

    @property
    def guard(self) -> int | None:
        """The process that resumes a held launcher."""
        return None if self._guard is None else self._guard.pid


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and that its parent does not reap does not."""
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
