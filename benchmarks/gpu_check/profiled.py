"""``deepspeed --module benchmarks.gpu_check.profiled --config ...``: train.py, whose last step's
update is traced into the run's folder, and which keeps no checkpoint."""

from __future__ import annotations

import functools
import os
import runpy
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu_check.trace import UPDATE
from benchmarks.gpu_check.training_job import STEP, TRACE
from papo.dist import checkpoint
from papo.dist.engine import Engine
from papo.policy.module import Scoring
from papo.train.state import RunState
from papo.train.step import Updater
from papo_kernels.ops import head, policy_loss, token_loss, token_stats

_OPERATIONS: tuple[types.ModuleType, ...] = (head, policy_loss, token_loss, token_stats)


def marked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function` within a range of the profiler."""

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*arguments, **named)

    return run


def mark() -> None:
    """Gives the parts of an update their ranges."""
    Scoring.forward = marked(Scoring.forward, "papo head, forward")  # type: ignore[method-assign]
    Engine.step = marked(Engine.step, "papo optimizer step")  # type: ignore[method-assign]
    for module in _OPERATIONS:
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, torch.autograd.Function):
                backward = marked(value.backward, "papo head, backward")
                value.backward = staticmethod(backward)  # type: ignore[assignment]


def traced(update: Callable[..., Any], number: int, path: str) -> Callable[..., Any]:
    """`update`, whose call of this number, counted from 1, leaves a trace in `path`."""
    done = 0

    @functools.wraps(update)
    def run(*arguments: Any, **named: Any) -> Any:
        nonlocal done
        done += 1
        if done != number:
            return update(*arguments, **named)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler, record_function(UPDATE):
            result = update(*arguments, **named)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        profiler.export_chrome_trace(path)
        return result

    return run


def main() -> None:
    mark()
    number, path = int(os.environ[STEP]), os.environ[TRACE]
    Updater.update = traced(Updater.update, number, path)  # type: ignore[method-assign]
    # Of a model that learns nothing, tens of GB.
    RunState.save = lambda *_: None  # type: ignore[method-assign]
    checkpoint.export = lambda *_: None
    sys.argv[0] = "train.py"
    runpy.run_path("train.py", run_name="__main__")


if __name__ == "__main__":
    main()
