"""The ranks of train.py as processes of their own: from scratch, or forked from this process once
it has imported all that they need, which saves most of what a start costs.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
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

import psutil

from tests.distributed.launch import ROOT, environment, free_port

_SCRIPT = str(ROOT / "train.py")
_POLL_SECONDS = 0.01
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of prctl


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


def prepare() -> None:
    """Import what a run imports, so that forked ranks begin behind it, and become the parent of
    what they leave behind. One thread each, as in `environment`.

    Raises:
        OSError: not on Linux.
    """
    _prctl(_SET_CHILD_SUBREAPER, 1)
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    late = "deepspeed.runtime.zero.muon.muon_optimizer"  # imported by the first engine
    for name in ("matplotlib.pyplot", "reasoning_gym", "papo.train.loop", late):
        importlib.import_module(name)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def start(
    world: int,
    arguments: list[str],
    folder: Path,
    *,
    fresh: bool = False,
    cwd: Path = ROOT,
    run: Callable[[list[str]], int] | None = None,
) -> list[Rank]:
    """`world` ranks of `train.py arguments...`.

    Args:
        folder: for the files they print to.
        fresh: start Python anew instead of forking this process.
        cwd: the folder they run in.
        run: what a forked rank does with `arguments` instead; its exit status.
    """
    port = free_port()
    ranks = []
    for rank in range(world):
        stdout, stderr = folder / f"rank{rank}.out", folder / f"rank{rank}.err"
        variables = environment(rank, world, port)
        for path in (stdout, stderr):
            path.write_bytes(b"")
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _become_rank(arguments, variables, (stdout, stderr), fresh, cwd, run or _train)
        until(lambda pid=pid: os.getpgid(pid) == pid, seconds=60)
        ranks.append(Rank(pid, stdout, stderr))
    return ranks


def _become_rank(
    arguments: list[str],
    variables: dict[str, str],
    outputs: tuple[Path, Path],
    fresh: bool,
    cwd: Path,
    run: Callable[[list[str]], int],
) -> NoReturn:
    """In the child: what a shell does between fork and exec, then train."""
    code = 1
    try:
        _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)  # no rank outlives an ended campaign
        os.setsid()
        os.chdir(cwd)
        for descriptor, path in enumerate((Path(os.devnull), *outputs)):
            os.dup2(os.open(path, os.O_RDWR), descriptor)
        if fresh:
            os.execve(sys.executable, [sys.executable, _SCRIPT, *arguments], variables)
        os.environ.clear()
        os.environ.update(variables)
        # DeepSpeed collects garbage four times an engine: not among all that has been imported.
        gc.freeze()
        code = run(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _train(arguments: list[str]) -> int:
    """What `python train.py arguments...` does once it has imported `papo`; its exit status."""
    from papo.cli import main

    script = ModuleType("__main__")  # which spawned workers import
    script.__file__ = _SCRIPT
    sys.modules["__main__"] = script
    sys.argv = [_SCRIPT, *arguments]
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    leave()
    return code


def leave() -> None:
    """In a forked rank: what Python does at its end."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()


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


def left_behind(seconds: float) -> list[str]:
    """The commands of processes that ranks have left and that are still there after `seconds`;
    these are killed."""
    until(lambda: not _descendants(), seconds)
    commands = []
    for process in _descendants():
        with contextlib.suppress(psutil.NoSuchProcess):
            commands.append(" ".join(process.cmdline()))
            process.kill()
    return commands


def _descendants() -> list[psutil.Process]:
    """The living processes below this one; those that have ended are reaped."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)
            else:
                found.append(process)
    return found
