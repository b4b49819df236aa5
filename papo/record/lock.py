"""A run's folder belongs to one run at a time: a lock that the run's process holds."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import socket
import time
from pathlib import Path

from papo.errors import PapoError

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# How often the file may be replaced between being opened and being locked, by runs that end.
_TRIES = 10


class FolderLock:
    """An exclusive lock on a folder, which is made if it does not exist.

    The operating system releases it when the process ends, however it ends. Processes that it
    starts do not inherit it.

    Args:
        folder: `output_dir` of the run.
        enabled: False on every rank but 0: nothing is made, and all methods do nothing.

    Attributes:
        warning: why nothing is locked; empty where it is.

    Raises:
        PapoError: another run holds the lock, or the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, enabled: bool = True) -> None:
        self.folder = folder
        self.warning = ""
        self._fd: int | None = None
        self._made: list[Path] = []
        if not enabled:
            return
        try:
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = self._locked(folder / NAME)
            self._sign()
        except (OSError, ValueError) as error:  # ValueError: NUL or a surrogate in the path
            self.close()
            raise cannot_use(folder, error) from error
        except PapoError:
            self.close()
            raise

    def _locked(self, path: Path) -> int:
        """A descriptor of the file at `path`, which is locked and still there."""
        for _ in range(_TRIES):
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(path, fd):  # a run that ended meanwhile has removed it
                    return fd
            except BlockingIOError:
                holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
                os.close(fd)
                raise self._taken(holder) from None
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    self.warning = (
                        f"output_dir={str(self.folder)!r}: its file system has no locks "
                        f"({error.strerror}); a second run there would not be noticed"
                    )
                    return fd
                os.close(fd)
                raise
            os.close(fd)
        raise self._taken("")

    def _taken(self, holder: str) -> PapoError:
        who = f" ({holder})" if holder.isprintable() and holder else ""
        return PapoError(
            f"output_dir={str(self.folder)!r}: another run is writing there{who}; "
            "wait for its end, stop it, or choose another output_dir"
        )

    def _sign(self) -> None:
        """Say in the file who holds the lock."""
        assert self._fd is not None
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        text = f"process {os.getpid()} on {socket.gethostname()} since {since}\n"
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

    def move_aside(self) -> Path:
        """Give the folder's content a name of its own and go on in an empty, locked folder.

        Returns:
            The content's folder.

        Raises:
            OSError: it cannot be moved, and the folder is as it was; or another run came first.
        """
        # Where the folder is a link, its target moves, and the link leads to the new one.
        folder, held = self.folder.resolve(), self._fd
        # It is locked before it gets the folder's name: no other run can come between.
        fresh = folder.with_name(f".{folder.name}.fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        self._fd = self._locked(fresh / NAME)
        try:
            self._sign()
            earlier = _swap(fresh, folder)
        except OSError:
            os.close(self._fd)
            self._fd = held
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        (earlier / NAME).unlink(missing_ok=True)
        if held is not None:
            os.close(held)
        return earlier

    def close(self) -> None:
        """Release the lock, and remove the folder if it was made here and nothing is in it."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                if _is_at(self.folder / NAME, self._fd):
                    (self.folder / NAME).unlink()
            os.close(self._fd)
            self._fd = None
        for path in self._made:
            with contextlib.suppress(OSError, ValueError):  # something is in it, or it was not made
                path.rmdir()


def _is_at(path: Path, fd: int) -> bool:
    """Whether `path` still is the file that was opened."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _swap(fresh: Path, folder: Path) -> Path:
    """Give `fresh` the folder's name; what has it now gets the first free number."""
    aside = (folder.with_name(f"{folder.name}.{n}") for n in itertools.count(1))
    earlier = folder.rename(next(path for path in aside if not path.exists()))
    try:
        fresh.rename(folder)
    except OSError:
        with contextlib.suppress(OSError):  # another run came first
            earlier.rename(folder)
        raise
    return earlier


def cannot_use(folder: Path, error: OSError | ValueError) -> PapoError:
    """The one line for a run's folder that cannot be made or written to."""
    reason = getattr(error, "strerror", None) or error
    return PapoError(
        f"output_dir={str(folder)!r}: {reason}; free some space or choose another output_dir"
    )
