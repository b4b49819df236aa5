"""A pytest plugin that writes failures down as they happen: ``-p benchmarks.gpu_check.failures``.

A run that is stopped prints no summary. The file named by PAPO_FAILURES gets a line for every
failure or error, and the one beside it, with ``.running`` behind its name, the tests under way.
With pytest-xdist the reports of all workers pass through the process that writes, a worker's death
included. Imports nothing but pytest.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "PAPO_FAILURES"


def running_file(path: Path) -> Path:
    return path.with_name(path.name + ".running")


class Failures:
    """The hooks, for the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.running: list[str] = []

    def _write_running(self) -> None:
        running_file(self.path).write_text("".join(f"{name}\n" for name in self.running))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.append(nodeid)
        self._write_running()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if nodeid in self.running:
            self.running.remove(nodeid)
            self._write_running()

    def _add(self, name: str, reason: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{name}: {reason}\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            where = "" if report.when == "call" else f" ({report.when})"
            self._add(report.nodeid + where, _reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(f"{report.nodeid} (collection)", _reason(report))


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The line that names the error."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[0] if crash is not None else lines[-1])[:300] if lines else "no reason given"


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get(VARIABLE)
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(Path(path)), "papo-failures")
