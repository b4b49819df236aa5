"""When a run leaves early: signals, or a launcher that is gone."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from papo.dist import launcher, termination
from papo.dist.launcher import Launcher
from papo.dist.termination import Termination

ROOT = Path(__file__).parents[2]
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Left(Exception):
    """In place of the process's end."""


class Watch(Termination):
    """Tells how it would have left."""

    def leave(self, status: int, line: str = "", wait_seconds: float = 0.0) -> NoReturn:
        raise Left(status, line)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock's time, to be set."""
    clock = [100.0]
    monkeypatch.setattr(termination.time, "monotonic", lambda: clock[0])
    return clock


class FakeProcess:
    """A launcher, and the `deepspeed` command that started it."""

    pid = 1

    def __init__(self, command: list[str], parent: FakeProcess | None = None) -> None:
        self._command, self._parent = command, parent
        self.running, self.state = True, psutil.STATUS_SLEEPING

    def cmdline(self) -> list[str]:
        return self._command

    def parent(self) -> FakeProcess | None:
        return self._parent

    def is_running(self) -> bool:
        return self.running

    def status(self) -> str:
        return self.state


def under(process: FakeProcess, monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(launcher.psutil, "Process", lambda pid: process)
    return Watch(leads=True, launcher=Launcher.find(), holds=False)


def alone(leads: bool = True) -> Watch:
    return Watch(leads=leads, launcher=None, holds=False)


# ---- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_the_first_signal_waits_for_the_steps_end(
    number: signal.Signals, now: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    watch = alone()
    watch.steps_begin()
    assert watch.reason == ""
    watch.arrived(number)
    assert watch.reason == number.name
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"{number.name}: the step ends and is saved; once more to leave at once"


@pytest.mark.parametrize(("number", "status"), [(INT, 130), (TERM, 143)])
def test_a_second_one_leaves_at_once(number: signal.Signals, status: int, now: list[float]) -> None:
    """Not its echo: a launcher passes on what the terminal has already sent."""
    watch = alone()
    watch.steps_begin()
    watch.arrived(INT)
    watch.arrived(TERM)
    now[0] += 60.0
    watch.arrived(HUP)  # the terminal closes while the step ends
    with pytest.raises(Left) as left:
        watch.arrived(number)
    assert left.value.args[0] == status
    assert left.value.args[1].startswith(f"{number.name}: the run ends at once; --resume auto")


@pytest.mark.parametrize("leads", [True, False])
def test_with_nothing_to_save_the_first_leaves_at_once(leads: bool) -> None:
    with pytest.raises(Left) as left:
        alone(leads).arrived(TERM)
    line = "SIGTERM: there is nothing to save; the run ends at once"
    assert left.value.args == (143, line if leads else "")


def test_after_the_last_step_there_is_nothing_to_save_again() -> None:
    watch = alone()
    watch.steps_begin()
    watch.steps_end(stopped=False)
    with pytest.raises(Left, match="nothing to save"):
        watch.arrived(INT)


def test_a_signal_that_the_last_step_did_not_see_is_followed(now: list[float]) -> None:
    watch = alone()
    watch.steps_begin()
    watch.arrived(INT)
    with pytest.raises(Left, match="SIGINT: the last step is saved"):
        watch.steps_end(stopped=False)


def test_once_a_signal_has_been_followed_others_change_nothing(now: list[float]) -> None:
    """The launcher's, which come one rank after the other."""
    watch = alone()
    watch.steps_begin()
    watch.arrived(INT)
    watch.steps_end(stopped=True)
    with pytest.raises(Left) as left:
        watch.arrived(TERM)
    assert left.value.args == (0, "")


def test_a_launchers_signal_for_a_lost_rank_is_no_wish_to_save(
    capfd: pytest.CaptureFixture[str],
) -> None:
    watch = alone()
    watch.lost = lambda: True
    watch.arrived(TERM)
    watch.steps_begin()
    watch.arrived(TERM)
    assert watch.reason == "" and not capfd.readouterr().err


def run_python(code: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def test_signals_are_seen_while_the_main_thread_is_stuck() -> None:
    """In a call that runs none of Python's handlers, as a collective does; children end too."""
    code = """
import ctypes, subprocess
from papo.dist import termination
termination.install()
child = subprocess.Popen(["sleep", "1000"])
print(child.pid, flush=True)
pipe = __import__("os").pipe()
libc, one = ctypes.CDLL(None), ctypes.create_string_buffer(1)
while True:
    libc.read(pipe[0], one, 1)
"""
    rank = run_python(code)
    assert rank.stdout is not None
    child = psutil.Process(int(rank.stdout.readline()))
    rank.send_signal(INT)
    _, err = rank.communicate(timeout=60)
    assert rank.returncode == 130
    assert err == "SIGINT: there is nothing to save; the run ends at once\n"
    assert psutil.wait_procs([child], timeout=60)[0] == [child]


# ---- the launcher -------------------------------------------------------------------------------


def test_a_signal_while_python_ends_does_not_change_the_status() -> None:
    """Before its last acts Python gives handlers that it knows their defaults."""
    code = f"""
import atexit, ctypes, os, sys
from papo.dist import termination

class Last:
    def __del__(self):
        os.kill(os.getpid(), {int(INT)})

ctypes.last = Last()  # one of the last objects to go
termination.install()
termination.PROCESS.close()
sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 3


def test_a_deepspeed_command_that_is_gone_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    command = FakeProcess(["python", "/bin/deepspeed", "train.py"])
    process = FakeProcess(["python", "-u", "-m", "deepspeed.launcher.launch"], command)
    watch = under(process, monkeypatch)
    assert watch.reason == ""
    command.running = False
    assert watch.reason == "the deepspeed command is gone"


def test_a_zombie_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command whose parent does not reap it: a container's first process, or one that reads its
    output to the end first."""
    command = FakeProcess(["python", "/bin/deepspeed", "train.py"])
    process = FakeProcess(["python", "-u", "-m", "deepspeed.launcher.launch"], command)
    watch = under(process, monkeypatch)
    command.state = psutil.STATUS_ZOMBIE
    assert watch.reason == "the deepspeed command is gone"
    command.state, process.state = psutil.STATUS_SLEEPING, psutil.STATUS_ZOMBIE
    assert watch.reason == "the deepspeed launcher is gone"
    process.state = psutil.STATUS_STOPPED  # held
    assert watch.reason == ""


def test_another_parent_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that leaves (nohup, a job system) does not end the run."""
    shell = FakeProcess(["bash"], FakeProcess(["sshd"]))
    watch = under(shell, monkeypatch)
    shell.running = False
    assert watch.reason == "" and not watch.launched


def test_a_parent_that_cannot_be_seen_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(launcher.psutil, "Process", gone)
    assert Launcher.find() is None


# What DeepSpeed's launcher does: it starts a rank, and at a signal it ends that and itself.
LAUNCHER = """
import os, signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", os.environ["RANKS_CODE"]])
def ends(*_):
    rank.send_signal(signal.SIGTERM)
    os.waitid(os.P_PID, rank.pid, os.WEXITED)
    print("the launcher ends", flush=True)
    os._exit(1)
signal.signal(signal.SIGINT, ends)
signal.signal(signal.SIGTERM, ends)
os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)
print("the launcher has waited", flush=True)
if sys.stdin.isatty():
    print("in the foreground:", os.tcgetpgrp(0) == os.getpgrp(), flush=True)
"""
RANK = """
from papo.dist import termination
termination.install()
watch = termination.PROCESS
watch.steps_begin()
print("ready", flush=True)
while not watch.reason:
    signal_or_poll.wait(0.05)
"""


RANK = "import threading\nsignal_or_poll = threading.Event()\n" + RANK


def start_launcher(code: str, **options: object) -> subprocess.Popen[str]:
    """A stand-in for the launcher, with one rank that runs `code`."""
    command = [sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "RANKS_CODE": code, "RANK": "0", "LOCAL_RANK": "0"},
        text=True,
        **{**streams, **options},  # type: ignore[call-overload]
    )


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """A launcher whose rank waits once it has been signalled."""
    launched = start_launcher(RANK + "print(watch.reason, flush=True)\ninput()\n")
    assert launched.stdout is not None and launched.stdout.readline() == "ready\n"
    yield launched
    launched.kill()
    launched.communicate()


def test_the_launcher_is_held_until_the_rank_has_left_in_whatever_way(process) -> None:
    """It would kill the rank 30 seconds after a signal."""
    seen = psutil.Process(process.pid)
    (rank,) = seen.children()
    process.send_signal(INT)
    assert process.stdout.readline() == "SIGTERM\n"
    assert seen.status() == psutil.STATUS_STOPPED
    rank.kill()
    assert process.stdout.readline() == "the launcher ends\n"


def test_ctrl_c_on_a_terminal_reaches_the_rank_alone() -> None:
    """The launcher waits for it, and has the foreground again when it has left."""
    screen, terminal = pty.openpty()

    def lead_a_session() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    launched = start_launcher(
        RANK + "print(watch.reason, flush=True)\n",
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=lead_a_session,
    )
    os.close(terminal)
    with os.fdopen(screen, "rb", buffering=0) as opened:
        lines = iter(opened.readline, b"")
        assert next(lines) == b"ready\r\n"
        os.write(screen, b"\x03")
        shown = [next(lines) for _ in range(4)]
        assert launched.wait() == 0
    assert shown[0].endswith(b"SIGINT: the step ends and is saved; once more to leave at once\r\n")
    assert shown[1:4] == [
        b"SIGINT\r\n",
        b"the launcher has waited\r\n",
        b"in the foreground: True\r\n",
    ]
