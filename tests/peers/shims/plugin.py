"""A pytest plugin that runs a peer's own tests with its functions replaced by a shim's.

``pytest -p shims.plugin --shim liger``. After collection every module that holds one of the
functions gets the shim's in its place, so that it does not matter from where a test imports it. A
test counts as ``reached`` where it called one. ``--report`` writes how the tests went as JSON.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_running = ""
_reached: set[str] = set()
_calls: Counter[str] = Counter()
_outcomes: dict[str, str] = {}
_messages: dict[str, str] = {}


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which notes what test called it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _calls[name] += 1
        _reached.add(_running)
        return function(*args, **kwargs)

    return call


def _is_of(value: Any, shim: ModuleType) -> bool:
    """Whether `value` is the peer's, under whatever name a test has loaded the peer's file."""
    owner = getattr(value, "__self__", value)
    return callable(value) and getattr(owner, "__module__", "").startswith(shim.MODULES)


def _replace(module: ModuleType, shim: ModuleType) -> None:
    for name, function in shim.FUNCTIONS.items():
        if _is_of(module.__dict__.get(name), shim):
            setattr(module, name, counted(name, function))
    for path, function in shim.METHODS.items():
        owner, name = path.split(".")
        value = module.__dict__.get(owner)
        if isinstance(value, type) and _is_of(value, shim):
            setattr(value, name, counted(path, function))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shim", required=True, help="a module of shims")
    parser.addoption("--report", type=Path, help="the JSON file to write")


def pytest_configure(config: pytest.Config) -> None:
    """Before collection: what a peer needs to be imported at all."""
    importlib.import_module(f"shims.{config.getoption('--shim')}")


def pytest_collection_finish(session: pytest.Session) -> None:
    shim = sys.modules[f"shims.{session.config.getoption('--shim')}"]
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and not module.__name__.startswith("shims."):
            _replace(module, shim)


def pytest_runtest_logstart(nodeid: str) -> None:
    global _running
    _running = nodeid


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        _messages[report.nodeid] = crash.message if crash else report.longreprtext


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--report")
    if path is None:
        return
    passed = sorted(n for n, outcome in _outcomes.items() if outcome == "passed")
    skipped = sum(outcome == "skipped" for outcome in _outcomes.values())
    reached = sorted(n for n in _reached if _outcomes.get(n) == "passed")
    report = {"passed": passed, "failed": _messages, "skipped": skipped, "reached": reached}
    path.write_text(json.dumps({**report, "calls": _calls}))
