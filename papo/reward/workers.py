"""The trainer's side of the reward workers: starts them, hands out tasks, and ends late ones.

Every worker has a channel of its own, and nothing here waits for one: what a worker writes, or
fails to read, costs its own task alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar, get_args

from papo.errors import PapoError, one_line
from papo.reward.judge import Judge, Task, Verdict
from papo.reward.processes import MARKER, kill_family
from papo.reward.worker import Setup
from papo.types import RewardStatus

log = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)  # tells a caller's tasks apart

_LOAD_SECONDS = 60.0  # for a worker to start and import the functions
_STARTS = 3  # in a row that may fail
_POLL_SECONDS = 0.1
_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 16  # of a worker's answers
_SHOWN_BYTES = 8192  # of what functions print during one `run`
_SHOWN_LINES = 200
_KEEPER_SECONDS = 2.0
_BOTH = selectors.EVENT_READ | selectors.EVENT_WRITE
_MAIN = "import sys; sys.path[:] = {path!r}; from papo.reward.worker import main; main({fd})"


class Output:
    """What the functions print: the first part is kept, the rest is counted."""

    def __init__(self) -> None:
        self._kept, self._dropped = bytearray(), 0

    def add(self, data: bytes) -> None:
        """Another part."""
        room = _SHOWN_BYTES - len(self._kept)
        self._kept += data[:room]
        self._dropped += len(data[room:])

    def show(self) -> None:
        """Log it, without what would move a terminal's cursor, and begin anew."""
        lines = self._kept.splitlines(keepends=True)
        for line in lines[:_SHOWN_LINES]:
            text = line.decode(errors="replace").rstrip("\r\n").expandtabs()
            log.info("verifier: %s", one_line(text))
        unshown = self._dropped + sum(map(len, lines[_SHOWN_LINES:]))
        if unshown:
            log.info("verifier: (%d more bytes are not shown)", unshown)
        self._kept, self._dropped = bytearray(), 0


class Worker(Generic[Key]):
    """A worker as the trainer sees it.

    Attributes:
        key: of the task that it has; None while it has none.
        ready: it has loaded the functions.
        used: it has had a task before this one.
        refusal: why it could not load them.
        verdict: on its task, once there is one.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, setup: bytes, selector: selectors.BaseSelector, output: Output) -> None:
        self.key: Key | None = None
        self.ready = self.used = False
        self.refusal = ""
        self.verdict: Verdict | None = None
        self._selector, self._printed = selector, output
        self._count = 0
        self._garbled = False
        self._unsent, self._received = bytearray(setup), b""
        self._until = time.monotonic() + _LOAD_SECONDS
        self._seconds = _LOAD_SECONDS
        self._marker = uuid.uuid4().hex
        self._group: int | None = None
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            self._channel, end = socket.socketpair()
            ours.enter_context(self._channel)
            theirs.enter_context(end)
            self._output, output_end = os.pipe()
            ours.callback(os.close, self._output)
            theirs.callback(os.close, output_end)
            self._process = self._launch(end.fileno(), output_end)
            ours.pop_all()
        self._channel.setblocking(False)
        os.set_blocking(self._output, False)
        selector.register(self._channel, _BOTH, self._exchange)
        selector.register(self._output, selectors.EVENT_READ, self._print)
        self._exchange(selectors.EVENT_WRITE)  # it loads although the trainer turns to other things

    def _launch(self, fd: int, output: int) -> subprocess.Popen[bytes]:
        path = [entry or os.getcwd() for entry in sys.path]
        return subprocess.Popen(
            [sys.executable, "-u", "-c", _MAIN.format(path=path, fd=fd)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=(fd,),
            start_new_session=True,
            env={**os.environ, MARKER: self._marker},
        )

    def give(self, key: Key, judge: int, task: bytes, seconds: float) -> None:
        """Hand it a pickled task, to be judged within `seconds`."""
        self.used, self.key = self._count > 0, key
        self._count += 1
        self._until, self._seconds = time.monotonic() + seconds, seconds
        self._unsent += pickle.dumps((self._count, judge, task))
        with contextlib.suppress(KeyError):  # closed since: `failure` will tell
            self._selector.modify(self._channel, _BOTH, self._exchange)

    def take(self) -> tuple[Key, Verdict]:
        """Its verdict, after which it may have another task."""
        assert self.key is not None and self.verdict is not None
        done = self.key, self.verdict
        self.key = self.verdict = None
        self._until = math.inf
        return done

    def failure(self) -> Verdict | None:
        """Why it is of no more use; None while it is, or has a verdict to be taken first."""
        code = self._process.poll()
        if code is not None or time.monotonic() > self._until:
            self._receive()  # the trainer may be the late one
        if self.verdict is not None:
            return None
        if self.refusal:
            return Verdict(0.0, "error", self.refusal)
        if self._garbled:
            return Verdict(0.0, "error", "the verifier wrote into its worker's channel")
        if code is not None:
            return Verdict(0.0, "error", _ending(code))
        if time.monotonic() > self._until:
            what = "verdict" if self.ready else "end of its import"
            return Verdict(0.0, "timeout", f"no {what} within {self._seconds:g} s")
        return None

    def stop(self) -> None:
        """Ask its keeper to end the family."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def join(self) -> None:
        """Wait until nothing of it is left."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KEEPER_SECONDS)
        # The keeper itself may have been killed.
        groups = [self._process.pid, *([] if self._group is None else [self._group])]
        kill_family(self._marker, groups)
        self._process.wait()
        for _ in range(_LONGEST_LINE // _SHOWN_BYTES):
            self._print(selectors.EVENT_READ)
        for file in (self._channel, self._output):
            with contextlib.suppress(KeyError):
                self._selector.unregister(file)
        self._channel.close()
        os.close(self._output)

    def _exchange(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            with contextlib.suppress(OSError):  # full, or closed, which reading tells
                del self._unsent[: self._channel.send(self._unsent)]
            if not self._unsent:
                self._selector.modify(self._channel, selectors.EVENT_READ, self._exchange)
        if events & selectors.EVENT_READ:
            self._receive()

    def _receive(self) -> None:
        try:
            data = self._channel.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # closed: its process is about to end, or runs until its deadline
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._channel)
            return
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            if not self._garbled:
                self._understand(line)
        self._garbled |= len(self._received) > _LONGEST_LINE

    def _understand(self, line: bytes) -> None:
        try:
            what, value, *rest = json.loads(line)
            if what == "ready" and not self.ready:
                self.ready, self._group, self._until = True, int(value), math.inf
            elif what == "refused" and not self.ready:
                self.refusal = str(value)
            elif what == self._count and self.key is not None:
                status, why = rest
                if status not in get_args(RewardStatus):
                    raise ValueError(status)
                number = math.nan if value is None else float(value)
                self.verdict = Verdict(number, status, str(why))
            else:
                self._garbled = True
        except (ValueError, TypeError, OverflowError, RecursionError):
            self._garbled = True

    def _print(self, events: int) -> None:
        try:
            data = os.read(self._output, _CHUNK)
        except BlockingIOError:
            return
        self._printed.add(data)
        if not data:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._output)


def _ending(code: int) -> str:
    number = -code if code < 0 else code - 128
    if number > 0:
        with contextlib.suppress(ValueError):
            return f"the worker was ended by {signal.Signals(number).name}"
    return f"the worker died with exit code {code}"


class Workers(Generic[Key]):
    """Workers that judge tasks, each with a deadline.

    A worker that is late, ends or misbehaves is ended with all that it has started, and another
    takes its place.

    Args:
        count: of workers.
        judges: that tasks may ask for, by index.
        memory_mib: `reward.memory_mib`.
    """

    def __init__(self, count: int, judges: Sequence[Judge], memory_mib: int) -> None:
        setup = Setup(pickle.dumps(list(judges)), os.getcwd(), memory_mib)
        self._setup = pickle.dumps(setup)
        self._names = f"reward.verifier={', '.join(judge.verifier for judge in judges)}"
        self._selector = selectors.DefaultSelector()
        self._output = Output()
        self._failed_starts = 0
        self._workers: list[Worker[Key]] = []
        try:
            for _ in range(count):
                self._workers.append(self._start())
        except PapoError:
            self.close()
            raise

    def _start(self) -> Worker[Key]:
        try:
            return Worker(self._setup, self._selector, self._output)
        except OSError as error:
            raise PapoError(f"a reward worker cannot be started: {error}") from error

    def load(self) -> None:
        """Wait until a worker has loaded the functions.

        Raises:
            PapoError: it could not.
        """
        while not any(worker.ready for worker in self._workers):
            self._exchange()
            failures = [f for w in self._workers if (f := w.failure()) is not None]
            if failures:
                self._output.show()
                why = failures[0].why
                raise PapoError(why if why.startswith("reward.") else f"{self._names}: {why}")

    def run(self, tasks: Mapping[Key, tuple[int, Task]], seconds: float) -> dict[Key, Verdict]:
        """The verdicts on `tasks`, each given as its judge's index and the task.

        A task whose worker died is given to a second one if the first had had other tasks, whose
        leftovers may be what ended it.

        Args:
            seconds: that a task may take.

        Raises:
            PapoError: the workers cannot be started any more.
        """
        waiting, again = deque(tasks), set[Key]()
        verdicts: dict[Key, Verdict] = {}
        while len(verdicts) < len(tasks):
            for worker in self._workers:
                while waiting and worker.ready and worker.key is None and not worker.failure():
                    self._give(worker, waiting.popleft(), tasks, seconds, verdicts)
            self._exchange()
            for place, worker in enumerate(self._workers):
                failure = worker.failure()
                if worker.verdict is not None:
                    self._failed_starts = 0
                    verdicts.update([worker.take()])
                if failure is None:
                    continue
                key, fresh = worker.key, not worker.used
                self._replace(place, failure)
                if key is None:
                    continue
                if failure.status == "timeout" or fresh or key in again:
                    verdicts[key] = failure
                else:
                    again.add(key)
                    waiting.appendleft(key)
        self._output.show()
        return verdicts

    def close(self) -> None:
        """End the workers, whatever they are doing, and all that they have started."""
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()
        self._workers = []
        self._output.show()
        self._selector.close()

    def _give(
        self,
        worker: Worker[Key],
        key: Key,
        tasks: Mapping[Key, tuple[int, Task]],
        seconds: float,
        verdicts: dict[Key, Verdict],
    ) -> None:
        judge, task = tasks[key]
        try:
            pickled = pickle.dumps(task)
        except Exception as error:  # such as metadata that cannot be pickled
            verdicts[key] = Verdict.failed(error)
        else:
            worker.give(key, judge, pickled, seconds)

    def _exchange(self) -> None:
        """Send and receive what can be sent and received now."""
        for key, events in self._selector.select(_POLL_SECONDS):
            key.data(events)

    def _replace(self, place: int, failure: Verdict) -> None:
        worker = self._workers.pop(place)
        worker.stop()
        worker.join()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts == _STARTS:
                self._output.show()
                raise PapoError(
                    f"reward workers failed to start {_STARTS} times in a row: {failure.why}; "
                    "look at the machine's free memory, and try reward.workers=1"
                )
        self._workers.insert(place, self._start())
