"""Verifiers that do what none should: `EVIL` names them, with the reward's status that each earns.

Every one may be named in `reward.verifier`. `EVIL_MODULES` holds the text of modules that cannot be
imported. No torch in this file: reward workers import it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal

MEBIBYTE = 1 << 20


class Hostile(BaseException):
    """Raises whatever is asked of it."""

    def __str__(self):
        raise Hostile

    __repr__ = __reduce__ = __bool__ = __float__ = __str__


class NamelessType(type):
    """Of classes that do not tell their names."""

    @property
    def __name__(cls):
        raise Hostile


class Nameless(Exception, metaclass=NamelessType):
    """An exception without a name."""


_HOARD: list[bytearray] = []


def by_name(text, answer, metadata):
    """The verifier that the completion names."""
    return globals()[text](text, answer, metadata)


def good(text, answer, metadata):
    return 0.5


def hoards(text, answer, metadata):
    """Takes a third of the memory that a worker may have, and keeps it."""
    _HOARD.append(bytearray(700 << 20))
    return 0.5


def own_process(text, answer, metadata):
    return os.getpid()


def raises_a_base_exception(text, answer, metadata):
    raise BaseException("base")


def raises_what_cannot_be_shown(text, answer, metadata):
    raise Hostile


def raises_what_has_no_name(text, answer, metadata):
    raise Nameless


def raises_half_a_surrogate_pair(text, answer, metadata):
    raise ValueError("\ud800\n\x1b[2J")


def raises_without_end(text, answer, metadata):
    raise ValueError("x" * 64 * MEBIBYTE)


def interrupts(text, answer, metadata):
    raise KeyboardInterrupt


def cancels(text, answer, metadata):
    raise asyncio.CancelledError


def exits(text, answer, metadata):
    sys.exit(3)


def exits_at_once(text, answer, metadata):
    os._exit(0)


def exits_with_a_status(text, answer, metadata):
    os._exit(7)


def aborts(text, answer, metadata):
    os.abort()


def kills_itself(text, answer, metadata):
    os.kill(os.getpid(), signal.SIGKILL)


def crashes(text, answer, metadata):
    os.kill(os.getpid(), signal.SIGSEGV)


def signals_its_group(text, answer, metadata):
    os.killpg(0, signal.SIGTERM)


def interrupts_its_group(text, answer, metadata):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.killpg(0, signal.SIGINT)


def kills_its_parent(text, answer, metadata):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1e6)


def signals_its_parents_group(text, answer, metadata):
    os.killpg(os.getpgid(os.getppid()), signal.SIGTERM)


def recurses(text, answer, metadata):
    return recurses(text, answer, metadata)


def recurses_in_c(text, answer, metadata):
    sys.setrecursionlimit(10**9)
    return json.loads("[" * 10**6)


def returns_a_huge_float(text, answer, metadata):
    return 1e308


def returns_a_huge_integer(text, answer, metadata):
    return 10**400


def returns_nan(text, answer, metadata):
    return float("nan")


def returns_none(text, answer, metadata):
    return None


def returns_a_complex_number(text, answer, metadata):
    return 1j


def returns_a_signaling_nan(text, answer, metadata):
    return Decimal("sNaN")


def returns_text(text, answer, metadata):
    return "0.5"


def returns_a_list(text, answer, metadata):
    return [0.5]


def returns_something_hostile(text, answer, metadata):
    return Hostile()


def returns_a_function(text, answer, metadata):
    return lambda: 0.5


def prints_without_end(text, answer, metadata):
    for _ in range(4):
        print("\x1b[2J\nout" * MEBIBYTE)
        os.write(2, b"\xff err" * MEBIBYTE)
    return 0.5


def closes_the_standard_files(text, answer, metadata):
    os.closerange(0, 3)
    return 0.5


def closes_every_file(text, answer, metadata):
    os.closerange(0, 4096)
    return 0.5


def writes_to_every_file(text, answer, metadata):
    for fd in range(3, 64):
        try:
            os.write(fd, b"[1, 0.5, \n" * 9)
        except OSError:
            continue
    return 0.5


def changes_its_surroundings(text, answer, metadata):
    os.chdir("/")
    os.environ.clear()
    sys.path.clear()
    sys.stdout = sys.stderr = None
    random.seed(0)
    return 0.5


def leaves_an_alarm(text, answer, metadata):
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    return 0.5


def leaves_threads(text, answer, metadata):
    for _ in range(8):
        threading.Thread(target=time.sleep, args=(1e6,)).start()
    return 0.5


def leaves_a_thread_that_ends_it(text, answer, metadata):
    def end():
        time.sleep(0.01)
        os._exit(1)

    threading.Thread(target=end).start()
    return 0.5


def _sleeper(metadata, **options):
    command = [sys.executable, "-S", "-c", "import time; time.sleep(1e6)"]
    subprocess.Popen([*command, str(metadata.get("sleeper", ""))], **options)


def leaves_children(text, answer, metadata):
    for _ in range(4):
        _sleeper(metadata)
    return 0.5


def leaves_a_daemon(text, answer, metadata):
    """In a session of its own, without a parent and without an environment."""
    if os.fork() == 0:
        os.setsid()
        _sleeper(metadata, env={}, start_new_session=True)
        os._exit(0)
    os.wait()
    return 0.5


def leaves_a_daemon_and_kills_its_parent(text, answer, metadata):
    leaves_a_daemon(text, answer, metadata)
    kills_its_parent(text, answer, metadata)


def comes_back_twice(text, answer, metadata):
    os.fork()
    return 0.5


def leaves_its_child_in_its_place(text, answer, metadata):
    if os.fork():
        os._exit(5)
    time.sleep(1e6)


def fills_the_memory(text, answer, metadata):
    return len(bytes(1 << 42))


def fills_the_memory_in_small_parts(text, answer, metadata):
    while True:
        metadata["kept"] = [bytes(64 * MEBIBYTE), metadata.get("kept")]


def hangs(text, answer, metadata):
    time.sleep(1e6)


def hangs_in_c(text, answer, metadata):
    re.match(r"(a+)+$", "a" * 60 + "b")  # catastrophic backtracking holds the interpreter's lock


def ignores_signals(text, answer, metadata):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1e6)


def stops_itself(text, answer, metadata):
    os.kill(os.getpid(), signal.SIGSTOP)


def stops_its_parent(text, answer, metadata):
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(1e6)


async def hangs_in_a_coroutine(text, answer, metadata):
    await asyncio.Event().wait()


_ERROR = (
    raises_a_base_exception,
    raises_what_cannot_be_shown,
    raises_what_has_no_name,
    raises_half_a_surrogate_pair,
    raises_without_end,
    interrupts,
    cancels,
    exits,
    exits_at_once,
    exits_with_a_status,
    aborts,
    kills_itself,
    crashes,
    interrupts_its_group,
    kills_its_parent,
    leaves_a_daemon_and_kills_its_parent,
    recurses,
    recurses_in_c,
    returns_a_complex_number,
    returns_a_signaling_nan,
    returns_text,
    returns_a_list,
    returns_something_hostile,
    returns_a_function,
    closes_every_file,
    writes_to_every_file,
    leaves_its_child_in_its_place,
    fills_the_memory,
    fills_the_memory_in_small_parts,
)
_INVALID = (
    signals_its_group,
    signals_its_parents_group,
    returns_a_huge_float,
    returns_a_huge_integer,
    returns_nan,
    returns_none,
)
_OK = (  # what they do besides is bad
    prints_without_end,
    closes_the_standard_files,
    changes_its_surroundings,
    leaves_an_alarm,
    leaves_threads,
    leaves_a_thread_that_ends_it,
    leaves_children,
    leaves_a_daemon,
    comes_back_twice,
)
_TIMEOUT = (
    hangs,
    hangs_in_c,
    ignores_signals,
    stops_itself,
    stops_its_parent,
    hangs_in_a_coroutine,
)
STATUS = {
    function.__name__: status
    for status, functions in (
        ("error", _ERROR),
        ("invalid", _INVALID),
        ("ok", _OK),
        ("timeout", _TIMEOUT),
    )
    for function in functions
}
EVIL = list(STATUS)

# Name, text, and a part of the one line that refuses it.
EVIL_MODULES = {
    "is_no_python": ("def f(:", "SyntaxError: "),
    "raises": ("raise ValueError('at import')", "ValueError: at import"),
    "raises_unicode": ("raise ValueError('\\ud800\\n')", "ValueError: \\ud800"),
    "leaves": ("raise SystemExit(0)", "SystemExit: 0"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "exits": ("import os; os._exit(0)", "the worker died with exit code 0"),
    "crashes": ("import os; os.abort()", "the worker was ended by SIGABRT"),
    "forks": ("import os; os.fork() or os._exit(0); raise OSError('parent')", "OSError: parent"),
    "lacks_it": ("", "module 'lacks_it' has no attribute 'f'"),
    "has_a_number": ("f = 3", "f is a int, not a function"),
    "takes_one": ("def f(text): pass", "its parameters are (text): expected (text, answer,"),
    "fills_memory": ("x = bytearray(1 << 42)", "MemoryError; reward.memory_mib="),
}
