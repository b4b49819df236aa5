"""Ranks that are lost: who noticed, who says so, and how the others end.

A rank that dies leaves the others waiting in a collective, for minutes or with an error of the
transport. Each rank therefore watches those of its own machine, and they tell each other through
the store at which they met. No torch here.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple, NoReturn, Protocol

import psutil

from papo.dist import termination
from papo.dist.launcher import is_alive
from papo.errors import PapoError, first_line

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 3.0
_FAREWELL_SECONDS = 30.0


met = False  # whether this process has met the other ranks, and fails together with them


class PeerError(PapoError):
    """Another rank is lost, or never came; `speaks`: this rank is the one that prints it."""

    def __init__(self, text: str, speaks: bool) -> None:
        super().__init__(text)
        self.speaks = speaks


class Store(Protocol):
    """What is used of `torch.distributed.Store`; its errors are RuntimeErrors."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


class Member(NamedTuple):
    """A rank's process; `machine`: where its pid means the same."""

    machine: str
    pid: int
    created: float

    @classmethod
    def this(cls) -> Member:
        """The process that asks."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Member:
        """A process of this machine."""
        namespace = ""  # containers of one machine may share its name
        with contextlib.suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid")
        machine = f"{socket.gethostname()} {namespace}"
        return cls(machine, pid, psutil.Process(pid).create_time())

    @property
    def host(self) -> str:
        """The machine's name."""
        return self.machine.split()[0]

    def is_gone(self) -> bool:
        """Whether the process has ended; for one of the same machine."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.created or not is_alive(process)
        except psutil.NoSuchProcess:
            return True


class Failure(NamedTuple):
    """Why the run cannot go on.

    Attributes:
        told_by: the rank that prints this itself, -1 for none.
        signalled: a rank leaves for a signal.
    """

    text: str
    told_by: int = -1
    signalled: bool = False


class Peers:
    """The ranks, as one of them sees the others.

    Args:
        store: a connection that nothing else uses; its keys are this class's own.
        rank: the one that sees.
        members: of each rank.
    """

    def __init__(self, store: Store, rank: int, members: Sequence[Member]) -> None:
        self._store, self.rank, self._members = store, rank, members
        machine = members[rank].machine
        self._near = [r for r, m in enumerate(members) if m.machine == machine and r != rank]
        self._lock = threading.Lock()
        self._left = threading.Event()

    def watch(self) -> None:
        """End this process where a peer is lost and the main thread waits for it."""
        global met
        met = True
        threading.Thread(target=self._watch, name="peers", daemon=True).start()
        process = termination.PROCESS
        process.lost = self._is_lost
        process.last_acts.insert(0, self._last_words)
        atexit.register(self._farewell)

    def _watch(self) -> None:
        while not self._left.wait(_POLL_SECONDS):
            failure = self.failure()
            if failure is not None and not self._left.wait(_grace_seconds(failure)):
                leave(self._error(failure))

    # ---- what is known --------------------------------------------------------------------------

    def failure(self) -> Failure | None:
        """What ends the run, None where all is well as far as can be seen."""
        gone = self._gone()
        try:
            with self._lock:
                if self._store.check(["failure"]):
                    return Failure(*json.loads(self._store.get("failure")))
                lost = [r for r in gone if not self._store.check([f"left/{r}"])]
        except RuntimeError:  # the store is gone, and rank 0 with it
            return Failure(self._is_gone(gone[0]) if gone else self._out_of_reach(0))
        return self._tell(Failure(self._is_gone(lost[0]))) if lost else None

    def _is_lost(self) -> bool:
        failure = self.failure()
        return failure is not None and not failure.signalled

    def _tell(self, failure: Failure) -> Failure:
        """Let all ranks know of a failure; the first one counts."""
        with contextlib.suppress(RuntimeError), self._lock:
            first = self._store.compare_set("failure", "", json.dumps(failure))
            return Failure(*json.loads(first))
        return failure

    def tell_own(self, error: Exception) -> None:
        """Let all ranks know of this rank's own failure.

        A PapoError is printed by rank 0 alone; whatever else by the rank that met it.
        """
        printed = self.rank == 0 or not isinstance(error, PapoError)
        told_by = self.rank if printed else -1
        self._tell(Failure(f"rank {self.rank}: {first_line(error)}", told_by))

    def _gone(self) -> list[int]:
        return [r for r in self._near if self._members[r].is_gone()]

    def _is_gone(self, rank: int) -> str:
        pid = self._members[rank].pid
        return (
            f"rank {rank} (pid {pid} on {self._members[rank].host}) is gone (killed or out of "
            "memory); the run ends; --resume auto continues from its newest checkpoint"
        )

    def _out_of_reach(self, rank: int) -> str:
        return (
            f"rank {rank} (on {self._members[rank].host}) cannot be reached; the run ends; "
            "--resume auto continues from its newest checkpoint"
        )

    def _error(self, failure: Failure) -> PeerError:
        gone = self._gone()
        lowest = min(r for r in range(len(self._members)) if r not in gone)
        return PeerError(failure.text, failure.told_by < 0 and lowest == self.rank)

    # ---- leaving --------------------------------------------------------------------------------

    def explained(self, error: Exception) -> PeerError | None:
        """The lost peer behind an error of the main thread, None where there is none.

        Args:
            error: a collective's, or anything else.
        """
        self._left.set()
        if not isinstance(error, RuntimeError):
            return None
        deadline = time.monotonic() + _GRACE_SECONDS
        while (failure := self.failure()) is None and time.monotonic() < deadline:
            time.sleep(0.1)  # connections end before their process does
        if failure is None and is_of_transport(error):
            text = f"a rank cannot be reached ({first_line(error)}); the run ends; --resume auto "
            failure = self._tell(Failure(f"{text}continues from its newest checkpoint"))
        return None if failure is None else self._error(failure)

    def leave(self) -> None:
        """Say that this rank's part is done, and look after no other any more."""
        self._left.set()
        termination.PROCESS.lost = lambda: False
        with contextlib.suppress(RuntimeError), self._lock:
            self._store.set(f"left/{self.rank}", "")

    def _last_words(self) -> None:
        """Of a process that ends at once: what the others hear, instead of silence."""
        name = termination.PROCESS.leaving_by
        text = f"rank {self.rank} has left{f' at {name}' if name else ''}; the run ends"
        self._tell(Failure(text, 0 if self.rank == 0 else -1, signalled=bool(name)))
        self.leave()
        self._farewell()

    def _farewell(self) -> None:
        """Wait a little in rank 0, which has the store, until the others are done with it."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        others = [r for r in range(len(self._members)) if r != self.rank]
        with contextlib.suppress(RuntimeError):
            while self.rank == 0 and others and time.monotonic() < deadline:
                gone = self._gone()
                with self._lock:
                    others = [
                        r for r in others if r not in gone and not self._store.check([f"left/{r}"])
                    ]
                time.sleep(0.05)


def _grace_seconds(failure: Failure) -> float:
    """In which the main thread meets the failure too, and may know it better."""
    return _GRACE_SECONDS if failure.told_by < 0 else 0.0


def is_of_transport(error: Exception) -> bool:
    """Whether an error is one of gloo's, NCCL's or the store's."""
    names = {base.__name__ for base in type(error).__mro__}
    text = str(error).lower()
    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    return "DistError" in names or any(word in text for word in words)


def leave(error: PeerError) -> NoReturn:
    """End this process for a peer."""
    if error.speaks:
        termination.PROCESS.leave(1, f"error: {error}")
    termination.PROCESS.leave_silently(1)
