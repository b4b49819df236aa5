"""Whom Ctrl-C reaches: rank 0 alone, where it has the terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import termios


class Terminal:
    """The controlling terminal, in whose foreground this process is from now on.

    Args:
        fd: open on the terminal.
        owner: the process group that had the foreground.
    """

    def __init__(self, fd: int, owner: int) -> None:
        self._fd, self._owner = fd, owner

    @classmethod
    def take(cls, launcher: int) -> Terminal | None:
        """Take the foreground from the launcher's process group, where that has it.

        Ctrl-C then does not end the launcher, which would not wait for the ranks. Ctrl-Z does
        nothing: it would suspend this process alone.
        """
        try:
            fd = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            owner = os.tcgetpgrp(fd)
            # Under `stty tostop` the other ranks could no longer write.
            stops_writers = termios.tcgetattr(fd)[3] & termios.TOSTOP
            if stops_writers or not owner == os.getpgrp() == os.getpgid(launcher):
                os.close(fd)
                return None
            os.setpgid(0, 0)
            # Only the foreground may change the foreground, unless it ignores this signal.
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            signal.signal(signal.SIGTSTP, signal.SIG_IGN)
            os.tcsetpgrp(fd, os.getpgrp())
        except (OSError, termios.error):
            os.close(fd)
            return None
        return cls(fd, owner)

    def give_back(self) -> None:
        """Put the former owner into the foreground again; nothing where it has ended."""
        with contextlib.suppress(OSError):
            if os.tcgetpgrp(self._fd) == os.getpgrp():
                os.tcsetpgrp(self._fd, self._owner)
