"""The ranks of train.py as processes of their own: from scratch, or forked from this process once
it has imported all that they need, which saves most of what a start costs.
"""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from tests.distributed.launch import ROOT, environment, free_port

# In the environment of every process of a case, and inherited by whatever these start.
MARK = "PAPO_CAMPAIGN_CASE"
_POLL_SECONDS = 0.01


@dataclass
class Rank:
    """A rank's process, which leads a session and a process group of its own.

    Attributes:
        stdout, stderr: the files it prints to.
        code: its exit status as in `subprocess`, None while it runs.
    """

    pid: int
    stdout: Path
    stderr: Path
    code: int | None = None

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def has_printed(self, start: str) -> bool:
        """Whether there is a line that begins so, or never will be."""
        lines = self.out.splitlines()
        return any(line.startswith(start) for line in lines) or self.poll() is not None

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        """A signal to the process, or to its group too; nothing where it has ended."""
        if self.poll() is None:
            (os.killpg if group else os.kill)(self.pid, number)

    @property
    def out(self) -> str:
        """What it has printed."""
        return self.stdout.read_text(errors="replace")

    @property
    def err(self) -> str:
        """Its errors and warnings."""
        return self.stderr.read_text(errors="replace")


def import_all() -> None:
    """Import what a run imports, so that forked ranks begin behind it. One thread each, as in
    `environment`."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    for name in ("matplotlib.pyplot", "reasoning_gym", "papo.train.loop"):
        importlib.import_module(name)


def start(
    world: int, arguments: list[str], folder: Path, mark: str, *, fresh: bool = False
) -> list[Rank]:
    """`world` ranks of `train.py arguments...`.

    Args:
        folder: for the files they print to.
        mark: the value of MARK in their environment.
        fresh: start Python anew instead of forking this process.
    """
    port = free_port()
    ranks = []
    for rank in range(world):
        stdout, stderr = folder / f"rank{rank}.out", folder / f"rank{rank}.err"
        variables = environment(rank, world, port, **{MARK: mark})
        for path in (stdout, stderr):
            path.write_bytes(b"")
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _become_rank(arguments, variables, stdout, stderr, fresh)
        until(lambda pid=pid: os.getpgid(pid) == pid, seconds=60)
        ranks.append(Rank(pid, stdout, stderr))
    return ranks


def _become_rank(
    arguments: list[str], variables: dict[str, str], stdout: Path, stderr: Path, fresh: bool
) -> NoReturn:
    """In the child: what a shell does between fork and exec, then train."""
    code = 1
    try:
        os.setsid()
        os.chdir(ROOT)
        for descriptor, path in ((0, Path(os.devnull)), (1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_RDWR), descriptor)
        if fresh:
            os.execve(sys.executable, [sys.executable, "train.py", *arguments], variables)
        os.environ.clear()
        os.environ.update(variables)
        code = _train(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _train(arguments: list[str]) -> int:
    """What `python train.py arguments...` does once it has imported `papo`; its exit status."""
    from papo.cli import main

    script = ModuleType("__main__")  # which spawned workers import
    script.__file__ = str(ROOT / "train.py")
    sys.modules["__main__"] = script
    sys.argv = ["train.py", *arguments]
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def call(function: Callable[[], str]) -> str:
    """What `function` returns in a forked child, whose threads do not become this process's.

    Raises:
        RuntimeError: it raised; the traceback is on stderr.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(writing, function().encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError("a forked child failed")
    return said


def until(condition: Callable[[], object], seconds: float) -> bool:
    """Wait for a condition to hold; False where it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def ended(ranks: list[Rank], seconds: float) -> bool:
    """Wait for all ranks to end; those that do not are killed, and False is returned."""
    if until(lambda: all(rank.poll() is not None for rank in ranks), seconds):
        return True
    for rank in ranks:
        rank.send(signal.SIGKILL, group=True)
    until(lambda: all(rank.poll() is not None for rank in ranks), seconds)
    return False


def left_behind(mark: str, seconds: float) -> list[str]:
    """The commands of the case's processes that are still there after `seconds`, and that are then
    killed."""
    until(lambda: not _marked(mark), seconds)
    found = _marked(mark)
    commands = [_read(pid, "cmdline").replace("\0", " ").strip() for pid in found]
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return commands


def _marked(mark: str) -> list[int]:
    wanted = f"{MARK}={mark}"
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if wanted in _read(pid, "environ").split("\0")]


def _read(pid: int, name: str) -> str:
    """A file of /proc; empty for a process that has ended or is another user's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
