"""When a run leaves early: SIGTERM, or a launcher that is gone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from papo.dist import termination
from papo.dist.termination import Termination


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """pytest's own handler is back after each test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class FakeProcess:
    """A launcher, and the `deepspeed` command that started it."""

    def __init__(self, command: list[str], parent: FakeProcess | None = None) -> None:
        self._command, self._parent, self.running = command, parent, True

    def cmdline(self) -> list[str]:
        return self._command

    def parent(self) -> FakeProcess | None:
        return self._parent

    def is_running(self) -> bool:
        return self.running


def under(process: FakeProcess, monkeypatch: pytest.MonkeyPatch) -> Termination:
    monkeypatch.setattr(termination.psutil, "Process", lambda pid: process)
    return Termination()


def test_sigterm_is_remembered_and_kills_nothing() -> None:
    watch = Termination()
    assert watch.reason == ""
    os.kill(os.getpid(), signal.SIGTERM)
    assert watch.reason == "SIGTERM"
    os.kill(os.getpid(), signal.SIGTERM)
    assert watch.reason == "SIGTERM"


def test_a_deepspeed_command_that_is_gone_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    command = FakeProcess(["python", "/bin/deepspeed", "train.py"])
    launcher = FakeProcess(["python", "-u", "-m", "deepspeed.launcher.launch"], command)
    watch = under(launcher, monkeypatch)
    assert watch.reason == ""
    command.running = False
    assert watch.reason == "the deepspeed command is gone"


def test_another_parent_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that leaves (nohup, a job system) does not end the run."""
    shell = FakeProcess(["bash"], FakeProcess(["sshd"]))
    watch = under(shell, monkeypatch)
    shell._parent.running = False
    assert watch.reason == ""


def test_a_parent_that_cannot_be_seen_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(termination.psutil, "Process", gone)
    assert Termination().reason == ""
