"""When and how a run leaves before its end: signals, or a launcher that is gone.

While steps run, a first SIGINT, SIGTERM or SIGHUP waits for the step's end and a checkpoint. Before
and after that there is nothing to save, and the process leaves at once, as it does at a second one.
Signals belong to the whole process, and so does what is here. No torch: its import takes seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import psutil

from papo.dist.launcher import Launcher
from papo.dist.terminal import Terminal
from papo.errors import one_line
from papo.reward.processes import MARKER

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One Ctrl-C may arrive twice, from the terminal and from a launcher that passes it on.
_SAME_PRESS_SECONDS = 2.0
SILENT_SECONDS = 2.0
_SHOW_CURSOR = b"\x1b[?25h"  # a live progress bar hides it


class _At(enum.Enum):
    """What a signal meets."""

    NOTHING_UNSAVED = enum.auto()
    STEP = enum.auto()
    ALL_SAVED = enum.auto()


class Termination:
    """Watches for reasons to leave.

    Args:
        leads: this rank speaks for all.
        launcher: of this rank, if any.
        holds: this rank suspends the launcher while the run saves.

    Attributes:
        lost: whether another rank is lost: a signal is the launcher's then, and no wish to save.
        leaving_by: name of the signal at which the process leaves at once, empty for none.
        last_acts: what is done before the process leaves at once.
    """

    def __init__(self, leads: bool, launcher: Launcher | None, holds: bool) -> None:
        self._leads, self._launcher, self._holds = leads, launcher, holds
        self._at = _At.NOTHING_UNSAVED
        self._signalled: signal.Signals | None = None
        self._again_from = 0.0
        self._leaving = threading.Lock()
        self.lost: Callable[[], bool] = lambda: False
        self.leaving_by = ""
        self.last_acts: list[Callable[[], None]] = []

    @property
    def launched(self) -> bool:
        """Whether DeepSpeed's launcher started this rank."""
        return self._launcher is not None

    def install(self) -> None:
        """Take the signals over, in the main thread.

        A thread reads them from a pipe, because Python's own handlers wait until a collective or a
        kernel that the main thread is in has returned.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._read, args=(read,), name="signals", daemon=True).start()

    def _read(self, pipe: int) -> None:
        while arrived := os.read(pipe, 64):
            for number in arrived:
                if number in _SIGNALS:
                    self.arrived(signal.Signals(number))

    def arrived(self, number: signal.Signals) -> None:
        """Do what a signal asks for; in the thread that reads them."""
        if self._at is _At.ALL_SAVED:
            self.leave(0)
        if self.lost():
            return
        if self._at is _At.NOTHING_UNSAVED:
            self._leave_by(number, "there is nothing to save; the run ends at once")
        if self._signalled is None:
            self._signalled = number
            if self._leads:
                _write(f"{number.name}: the step ends and is saved; once more to leave at once")
            if self._holds and self._launcher is not None:
                self._launcher.hold()
            self._again_from = time.monotonic() + _SAME_PRESS_SECONDS
        elif number != signal.SIGHUP and time.monotonic() >= self._again_from:
            self._leave_by(
                number,
                "the run ends at once; --resume auto continues from the newest "
                "checkpoint, if there is one",
            )

    def _leave_by(self, number: signal.Signals, what: str) -> NoReturn:
        self.leaving_by = number.name
        if self._leads:
            self.leave(128 + number, f"{number.name}: {what}")
        self.leave_silently(128 + number)

    @property
    def reason(self) -> str:
        """Why to save and leave, empty where there is no reason to."""
        if self._signalled is not None:
            return self._signalled.name
        return "" if self._launcher is None else self._launcher.gone

    def steps_begin(self) -> None:
        """From now on a signal waits for the step's end."""
        self._at = _At.STEP

    def steps_end(self, stopped: bool) -> None:
        """All steps are saved; `stopped`: a signal has been followed, and no other matters."""
        if stopped:
            self._at = _At.ALL_SAVED
            return
        self._at = _At.NOTHING_UNSAVED
        if self._signalled is not None:
            self._leave_by(self._signalled, "the last step is saved; the run ends")

    def close(self) -> None:
        """Ignore signals: nothing is left for them to stop, and Python, which gives them their
        defaults first, takes seconds to end."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def leave_silently(self, status: int) -> NoReturn:
        """`leave`, after the rank that says why: a launcher ends all once one has failed."""
        self.leave(status, wait_seconds=SILENT_SECONDS)

    def leave(self, status: int, line: str = "", wait_seconds: float = 0.0) -> NoReturn:
        """End the process with its children, whatever its threads are doing.

        Args:
            status: of the process.
            line: for the screen.
        """
        self._leaving.acquire()  # a second thread that comes here waits for the end
        if os.isatty(1):
            with contextlib.suppress(OSError):
                os.write(1, _SHOW_CURSOR)
        if line:
            _write(line)
        self._kill_children()
        for act in self.last_acts:
            act()
        time.sleep(wait_seconds)
        os._exit(status)

    def _kill_children(self) -> None:
        guard = None if self._launcher is None else self._launcher.guard
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.pid != guard and not _ends_by_itself(child):
                        child.kill()


def _ends_by_itself(child: psutil.Process) -> bool:
    """Whether a child has something to clean up when this process ends: Python's own tracker its
    semaphores, a reward worker whatever its verifier has started."""
    return "resource_tracker" in " ".join(child.cmdline()) or MARKER in child.environ()


def _write(line: str) -> None:
    """To stderr itself: another thread may hold the locks of Python's and of the progress bar."""
    with contextlib.suppress(OSError):
        os.write(2, f"{one_line(line)}\n".encode())


PROCESS = Termination(leads=True, launcher=None, holds=False)


def install() -> None:
    """Watch over this process from now on; to be called before what takes time."""
    global PROCESS
    # Not `environment.place`, whose errors come later, with the others.
    leads = os.environ.get("RANK", "0") == "0"
    launcher = Launcher.find()
    PROCESS = Termination(leads, launcher, holds=os.environ.get("LOCAL_RANK", "0") == "0")
    PROCESS.install()
    terminal = Terminal.take(launcher.process.pid) if launcher is not None and leads else None
    if terminal is not None:
        PROCESS.last_acts.append(terminal.give_back)
        atexit.register(terminal.give_back)
