"""Runs stages: each in a process group of its own, within its limit, its output in a log; the
record of all of them is rewritten after every one.

A stage is a forked child of this process, which has imported torch once for all of them and never
touches the device itself, or a program of its own. So a crash, a hang or a CUDA error that stays
with its process costs one stage and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_check import failures, worker
from benchmarks.gpu_check.files import clipped, pack, portable, read
from benchmarks.harness import ROOT, save_json

STOPPED = "stopped at its limit"
INTERRUPTED = "under way when the check was interrupted"
LEAST = 2.0  # seconds; with less than this left a stage is not begun
ELASTICITY = 2.0  # what an elastic stage may take, as a multiple of its limit
PATIENCE = 5.0  # seconds that a killed process is waited for
TAIL_LINES, TAIL_BYTES = 25, 3000
MOST_FAILURES = 40


class Stage(NamedTuple):
    """One process of a call.

    Attributes:
        name: of its log, its notes and its entry in the record.
        limit: seconds that are kept for it, whatever the stages before it take.
        work: the worker's arguments, in a forked child.
        command: a program to run instead.
        environment: variables that are set for it.
        elastic: it may also use what the stages before it have left over.
        vital: it may even use the time of the stages behind it, which are little without it.
        restarts: it is begun anew when it dies, as long as its notes tell of progress.
        together: it runs at the same time as the stage before it.
        required: whether the whole check fails with it.
        absent: why it cannot be run on this machine; it is then skipped.
    """

    name: str
    limit: float
    work: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    elastic: bool = False
    vital: bool = False
    restarts: bool = False
    together: bool = False
    required: bool = True
    absent: str = ""


def groups(stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages in their order, those that run at the same time in one list."""
    found: list[list[Stage]] = []
    for stage in stages:
        if stage.together and found:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found


def group_limit(group: Sequence[Stage]) -> float:
    return max(stage.limit for stage in group)


def allowed(group: Sequence[Stage], later: float, left: float) -> float:
    """Seconds that a group gets, with `left` until the call must end and `later` kept for the
    groups behind it: its limit, up to twice that where it is elastic and time is left over or where
    it is vital, and never more than is left."""
    limit = group_limit(group)
    if any(stage.vital for stage in group):
        limit *= ELASTICITY
    elif any(stage.elastic for stage in group):
        limit = max(limit, min(ELASTICITY * limit, left - later))
    return max(0.0, min(limit, left))


# ---- signals ------------------------------------------------------------------------------------

_HANDLED = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_received: list[int] = []


def heed_signals() -> None:
    """From here on SIGINT and SIGTERM end this process at one point only, `leave_if_told`: nothing
    is interrupted between a child's start and its entry among those that must be ended."""
    for number in _HANDLED:
        signal.signal(number, lambda received, _: _received.append(received))


def leave_if_told() -> None:
    if _received:
        sys.exit(128 + _received[0])


# ---- one process --------------------------------------------------------------------------------


def start(stage: Stage, log: Path, variables: dict[str, str], fork: bool) -> int:
    """Starts a stage's process, the leader of a process group, and returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # the child does the same; whoever comes first
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        _become(stage, log, variables, fork)
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _become(stage: Stage, log: Path, variables: dict[str, str], fork: bool) -> None:
    """What the child does."""
    for number, handler in _HANDLED.items():
        signal.signal(number, handler)
    os.setpgid(0, 0)
    os.chdir(ROOT)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", 1, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, closefd=False)
    print("$", shlex.join(stage.command or worker_command(stage.work)), flush=True)
    os.environ.update(variables)
    if stage.command:
        os.execvp(stage.command[0], stage.command)
    if not fork:
        os.execv(sys.executable, worker_command(stage.work))
    sys.exit(worker.main(stage.work))


def worker_command(work: Sequence[str]) -> list[str]:
    """A worker as a program of its own, for what starts programs and cannot fork."""
    return [sys.executable, "-m", "benchmarks.gpu_check.worker", *work]


def exited(pid: int) -> bool:
    """Whether a child has ended; it is not reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end(pid: int) -> int | str | None:
    """Kills what is left of a child's group and reaps the child: its exit status, or a signal's
    name; None where it would not end, as a process that waits in a driver may not."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    give_up = time.monotonic() + PATIENCE
    while not exited(pid):
        if time.monotonic() > give_up:
            return None
        time.sleep(0.02)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else signal.Signals(-code).name


# ---- a call -------------------------------------------------------------------------------------


class Runner:
    """The stages of a call, one group after the other.

    Args:
        work: for logs and notes; what a call finds there of an earlier one stays in the record.
        out: gets the record, the archive of the logs, the table and the tuned table.
        name: of the record in `out`.
        budget: seconds, for all stages.
    """

    def __init__(self, work: Path, out: Path, name: str, budget: float) -> None:
        self.work, self.out, self.name = work, out, name
        self.logs = work / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + budget
        self.record: dict[str, Any] = read_record(work)
        self.fork = True

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The outcomes so far, by name."""
        stages: dict[str, dict[str, Any]] = self.record["stages"]
        return stages

    def rename(self, name: str) -> None:
        """Keeps the record in `out` under another name from here on."""
        (self.out / f"{self.name}.json").unlink(missing_ok=True)
        self.name = name
        self.save()

    def save(self) -> None:
        """The record in both places, and the archive."""
        save_json(self.work / "record.json", self.record)
        save_json(self.out / f"{self.name}.json", self.record)
        pack(self.logs, self.out / "logs.tar.gz")

    def run(self, stages: Sequence[Stage], after: Callable[..., Any] | None = None) -> None:
        """Runs the stages; `after(runner, name)` is called when one is in the record."""
        waiting = groups(stages)
        for group in waiting[:]:
            waiting.pop(0)
            later = sum(map(group_limit, waiting))
            limit = allowed(group, later, self.deadline - time.monotonic())
            try:
                self.run_group(group, limit)
                for stage in group:
                    print(_line(stage.name, self.stages[stage.name]), flush=True)
                    if after is not None:
                        self.attempt(f"after {stage.name}", after, self, stage.name)
            finally:
                self.save()

    def attempt(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls what only digests what was found: an error in it is in the record, and no more."""
        try:
            return function(*arguments)
        except Exception:
            error = portable(traceback.format_exc()).splitlines()
            self.record.setdefault("errors", {})[what] = error
            return None

    def run_group(self, group: Sequence[Stage], limit: float) -> None:
        """Runs a group's stages, all of them started at once, and records the outcome of each."""
        if limit < LEAST:
            group = [s._replace(absent="no time is left for it") for s in group]
        if any(s.absent for s in group):
            self.stages.update({s.name: {"ok": not s.required, "skipped": s.absent} for s in group})
            return
        whole, now = group_limit(group), time.monotonic()
        # What the group gets beyond its limit is for the stages that have that limit.
        limits = {s: limit if s.limit == whole else min(limit, s.limit) for s in group}
        running = {stage: self._begin(stage) for stage in group}
        outcomes = {}
        try:
            while running:
                leave_if_told()
                for stage, (pid, begun, tries) in list(running.items()):
                    died = exited(pid)
                    if not died and time.monotonic() < now + limits[stage]:
                        continue
                    code = end(pid)
                    if code is None:
                        code = "could not be ended"
                    elif not died:
                        code = STOPPED
                    if self._is_begun_anew(stage, code, tries):
                        tries = [*tries, self._progress(stage)]
                        running[stage] = (self._start(stage), begun, tries)
                        continue
                    del running[stage]
                    outcome = self._outcome(stage, code, begun, limits[stage], len(tries))
                    outcomes[stage.name] = outcome
                time.sleep(0.02)
        finally:
            for stage, (pid, begun, tries) in running.items():  # where this process is interrupted
                end(pid)
                outcome = self._outcome(stage, INTERRUPTED, begun, limits[stage], len(tries))
                outcomes[stage.name] = outcome
            self.stages.update({stage.name: outcomes[stage.name] for stage in group})

    # ---- of one stage ----

    def _paths(self, stage: Stage) -> tuple[Path, Path, Path]:
        """Its log, its notes, and the failures of its tests."""
        log, notes = self.logs / f"{stage.name}.log", self.work / f"{stage.name}.json"
        return log, notes, self.logs / f"{stage.name}.failures"

    def _begin(self, stage: Stage) -> tuple[int, float, list[str]]:
        log, notes, failed = self._paths(stage)
        for path in (log, notes, failed, failures.running_file(failed)):
            path.unlink(missing_ok=True)
        log.touch()
        return self._start(stage), time.monotonic(), [self._progress(stage)]

    def _start(self, stage: Stage) -> int:
        log, notes, failed = self._paths(stage)
        variables = {
            worker.STAGE: stage.name,
            worker.NOTES: str(notes),
            worker.WORK: str(self.work),
            failures.VARIABLE: str(failed),
            **dict(stage.environment),
        }
        return start(stage, log, variables, self.fork)

    def _progress(self, stage: Stage) -> str:
        notes = self._paths(stage)[1]
        return notes.read_text() if notes.exists() else ""

    def _is_begun_anew(self, stage: Stage, code: int | str, tries: list[str]) -> bool:
        alive = code in (0, STOPPED, "could not be ended")
        return stage.restarts and not alive and self._progress(stage) != tries[-1]

    def _outcome(
        self, stage: Stage, code: int | str, begun: float, limit: float, tries: int
    ) -> dict[str, Any]:
        log, notes, failed = self._paths(stage)
        lines = clipped(log.read_bytes(), 200_000).decode(errors="replace").splitlines()
        tail = portable("\n".join(lines[-TAIL_LINES:])).encode()
        outcome: dict[str, Any] = {
            "ok": code == 0,
            "exit": code,
            "seconds": round(time.monotonic() - begun, 1),
            "limit": round(limit, 1),
            "required": stage.required,
            "tail": clipped(tail, TAIL_BYTES).decode(errors="replace").splitlines(),
        }
        if tries > 1:
            outcome["starts"] = tries
        if found := read(notes):
            outcome["result"] = json.loads(portable(json.dumps(found)))
        if failed.exists():
            outcome["failures"] = portable(failed.read_text()).splitlines()[:MOST_FAILURES]
        under_way = failures.running_file(failed)
        if under_way.exists() and (names := under_way.read_text().splitlines()):
            outcome["under way"] = names[:MOST_FAILURES]
        return outcome


def _line(name: str, outcome: dict[str, Any]) -> str:
    """What is printed of a stage when it is over."""
    if "skipped" in outcome:
        return f"== {name}: skipped: {outcome['skipped']}"
    word = "ok" if outcome["ok"] else f"FAILED, exit {outcome['exit']}"
    line = f"== {name}: {word}, {outcome['seconds']} of {outcome['limit']} s"
    if not outcome["ok"]:
        line += "".join(f"\n   {text[:160]}" for text in outcome["tail"][-3:])
    return line


def read_record(work: Path) -> dict[str, Any]:
    """What earlier calls found; without stages where there is no whole record."""
    record = read(work / "record.json")
    stages, environment = record.get("stages"), record.get("environment", {})
    whole = isinstance(stages, dict) and all(isinstance(s, dict) for s in stages.values())
    return record if whole and isinstance(environment, dict) else {"stages": {}}


def clear(work: Path) -> None:
    """Forgets what earlier calls found; what they built stays."""
    shutil.rmtree(work / "logs", ignore_errors=True)
    for path in work.glob("*.json"):
        path.unlink()
