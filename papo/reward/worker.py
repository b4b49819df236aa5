"""A reward worker: three processes, of which the last runs the user's functions.

The keeper is the trainer's child. It adopts the orphans among its descendants, and when the others
end, or the trainer does, it kills whatever is left of the family and ends too. So nothing that a
function started outlives its worker. The shield stands between the keeper and the process that runs
the functions, and each of the three leads a session of its own. So signals that a function sends to
its group, its parent or its parent's group reach neither the keeper nor the trainer.

No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import pickle
import resource
import signal
import socket
import sys
import threading
from typing import IO, NamedTuple, NoReturn

from papo.reward.processes import MARKER, kill_family

_PR_SET_CHILD_SUBREAPER = 36
# The launcher sends SIGTERM to all descendants of a rank that is still to save its step.
_OTHERS_BUSINESS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Setup(NamedTuple):
    """What a worker is told first.

    Attributes:
        judges: pickled, so that they are read after the limits apply.
        folder: where the run was started. It comes first on the workers' path.
        memory_mib: `reward.memory_mib`.
    """

    judges: bytes
    folder: str
    memory_mib: int


def main(fd: int) -> NoReturn:
    """Be a worker.

    Args:
        fd: of a socket to the trainer. Down it come pickles: a `Setup`, then tasks, each with its
            number and the index of its judge. Up go lines of JSON: `["ready", process id]` or
            `["refused", why]`, then for each task its number and its verdict.
    """
    marker = os.environ[MARKER]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in _OTHERS_BUSINESS:
        signal.signal(number, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        _shield(fd)
    os.close(fd)
    threading.Thread(target=_follow_trainer, args=(marker, child), daemon=True).start()
    _end_family(marker, child, _exit_code_of(child))


def _shield(fd: int) -> NoReturn:
    os.setsid()
    child = os.fork()
    if child == 0:
        _work(fd)
    os.close(fd)
    os._exit(_exit_code_of(child))


def _exit_code_of(child: int) -> int:
    """Wait for a child, and for orphans that end before it; 128 and its number for a signal."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _follow_trainer(marker: str, child: int) -> NoReturn:
    """End when the other end of standard input is closed, which nobody but the trainer holds."""
    while os.read(0, 1):
        pass
    _end_family(marker, child, 0)


def _end_family(marker: str, child: int, code: int) -> NoReturn:
    kill_family(marker, (child,), spare=os.getpid())
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    os._exit(code)


def _work(fd: int) -> NoReturn:
    """The process that runs the functions. It ends without cleaning up, which may hang."""
    code = 1
    try:
        os.setsid()
        _stay_at_signals()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        channel = socket.socket(fileno=fd)
        channel.set_inheritable(False)
        # A forked child may come back from a function, and would then answer in our place.
        os.register_at_fork(after_in_child=channel.close)
        _serve(channel, channel.makefile("rb"))
        code = 0
    except OSError:  # the trainer is gone, or a function has closed the channel
        pass
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _stay_at_signals() -> None:
    """Go on at a signal that is meant for the trainer. What a function starts has the defaults: it
    may want to end it."""

    def restore() -> None:
        for number in _OTHERS_BUSINESS:
            signal.signal(number, signal.SIG_DFL)

    for number in _OTHERS_BUSINESS:
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, it ends with an exec
    os.register_at_fork(after_in_child=restore)


def _serve(channel: socket.socket, stream: IO[bytes]) -> None:
    from papo.reward.judge import Verdict, described

    def say(*words: object) -> None:
        channel.sendall(json.dumps(words).encode() + b"\n")

    setup: Setup = pickle.load(stream)
    too_little = f"; reward.memory_mib={setup.memory_mib} is too little for it"
    _limit(setup.memory_mib)
    sys.path.insert(0, setup.folder)
    try:
        judges = pickle.loads(setup.judges)
        for judge in judges:
            judge.load()
    except BaseException as error:
        why = described(error)
        say("refused", why + too_little if _lacks_memory(why) else why)
        return
    say("ready", os.getpid())
    exhausted = used = False
    while not exhausted:
        try:
            number, index, task = pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):  # the trainer is gone
            return
        with contextlib.suppress(OSError):
            os.chdir(setup.folder)
        try:
            verdict = judges[index].verdict(pickle.loads(task))
        except BaseException as error:  # such as metadata that cannot be unpickled
            verdict = Verdict.failed(error)
        signal.setitimer(signal.ITIMER_REAL, 0.0)  # a function may have left its alarm on
        exhausted = verdict.status == "error" and _is_exhausted(verdict.why)
        if exhausted and used:  # perhaps by earlier tasks: a fresh worker takes this one over
            return
        if exhausted and _lacks_memory(verdict.why):
            verdict = verdict._replace(why=verdict.why + too_little)
        used = True
        value = None if math.isnan(verdict.value) else verdict.value
        say(number, value, verdict.status, verdict.why)


def _is_exhausted(why: str) -> bool:
    """Whether an error's text tells that the process has none left of what each task needs."""
    return _lacks_memory(why) or "start new thread" in why or "Too many open files" in why


def _lacks_memory(why: str) -> bool:
    """Whether an error's text tells of too little memory, as Python, numpy, torch or the system
    say it."""
    return "MemoryError" in why or "allocate memory" in why


def _limit(memory_mib: int) -> None:
    """Bound the address space, and leave no core files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_mib:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        asked = memory_mib << 20
        allowed = asked if hard == resource.RLIM_INFINITY else min(asked, hard)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
