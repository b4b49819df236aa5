"""Verifiers that no run may be ended or held up by, and what they leave behind."""

from __future__ import annotations

import logging
import math
import os
import pickle
import select
import selectors
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from papo.errors import PapoError
from papo.reward import processes, workers
from papo.reward.judge import Judge, Task, Verdict
from papo.reward.pool import RewardPool
from papo.reward.processes import family, kill_family
from tests.trainer.evil_verifiers import EVIL, EVIL_MODULES, STATUS
from tests.trainer.test_reward import ROOT, completion, config


def processes_named(name):
    """The living processes that have `name` among their arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if name.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def evil():
    """A pool of one worker, so that each function's leftovers meet the next completion. When it has
    been closed, nothing is left of any of them."""
    rules = config(workers=1, memory_mib=2048)
    name = uuid.uuid4().hex
    with RewardPool(rules, ["tests.trainer.evil_verifiers:by_name"]) as pool:
        yield pool, rules, name
    assert processes_named(name) == []


@pytest.mark.parametrize("name", EVIL)
def test_it_costs_its_own_completion_alone(evil, name, caplog):
    pool, rules, sleeper = evil
    pool.counts.clear()
    rules.timeout_s = 0.3 if STATUS[name] == "timeout" else 60.0
    with caplog.at_level(logging.INFO, logger="papo.reward"):
        (bad,) = pool.score([completion(name, sleeper=sleeper)])
        rules.timeout_s = 60.0
        (good,) = pool.score([completion("good")])
    assert bad.status == STATUS[name], caplog.text
    assert good.value == 0.5
    if bad.status == "invalid":
        assert math.isnan(bad.value)
    else:
        assert bad.value == (0.5 if bad.status == "ok" else 0.0)
    caplog.text.encode()  # and nothing that cannot be written
    assert len(caplog.records) <= 203 and len(caplog.text) < 30_000
    if "memory" in name:
        assert "reward.memory_mib=2048 is too little for it" in caplog.text
    if name == "prints_without_end":
        assert "more bytes are not shown" in caplog.text and "\x1b" not in caplog.text


@pytest.mark.parametrize("name", EVIL_MODULES)
def test_a_module_that_cannot_be_imported_is_one_line(name, tmp_path, monkeypatch):
    """The current folder is on the workers' path, and on nobody else's."""
    text, line = EVIL_MODULES[name]
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PapoError) as caught:
        RewardPool(config(workers=1), [f"{name}:f"])
    told = str(caught.value)
    assert told.startswith("reward.verifier=") and f"{name}:f" in told and line in told
    assert "\n" not in told and told.isprintable()


def test_an_import_that_hangs_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(1e6)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "_LOAD_SECONDS", 0.5)
    with pytest.raises(PapoError, match=r"sleeps:f: no end of its import within 0\.5 s"):
        RewardPool(config(workers=1), ["sleeps:f"])


@pytest.fixture
def clock(monkeypatch):
    """``clock.now``: the workers' deadlines pass when a test says so."""
    fake = SimpleNamespace(now=0.0)
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def said(worker):
    """Wait until the worker has said something, which stays unread."""
    readable, _, _ = select.select([worker._channel], [], [], 60.0)
    assert readable, "it never said anything"


def test_workers_load_while_the_trainer_turns_to_other_things(clock):
    """The first scoring may come long after the deadline for their imports, and so may the one
    after workers were replaced."""
    with RewardPool(config(), ["exact"]) as pool:
        for worker in pool._workers._workers:
            said(worker)
        clock.now += 1000.0
        assert [r.status for r in pool.score([completion("1")] * 4)] == ["ok"] * 4


def test_a_verdict_that_the_trainer_reads_late_is_in_time(clock):
    judges = [Judge("tests.trainer.scripted:scripted", "none", 0.99)]
    pool = workers.Workers(1, judges, memory_mib=4096)
    try:
        pool.load()
        (worker,) = pool._workers
        for text, value in (("x", 0.25), ("y", 0.5)):
            task = Task(text, "1", {"value": value})
            worker.give(text, 0, pickle.dumps(task), 1.0)
            worker._exchange(selectors.EVENT_WRITE)
            said(worker)
            clock.now += 2.0
            assert worker.failure() is None
            assert worker.take() == (text, Verdict(value, "ok"))
        worker.give("z", 0, pickle.dumps(Task("hang", "1", {})), 1.0)
        clock.now += 2.0
        assert worker.failure() == Verdict(0.0, "timeout", "no verdict within 1 s")
    finally:
        pool.close()


def test_a_worker_that_cannot_be_started_leaves_no_file_open(monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("Cannot allocate memory")

    before = psutil.Process().num_fds()
    for owner, name in ((subprocess, "Popen"), (os, "pipe"), (workers.socket, "socketpair")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(PapoError, match="a reward worker cannot be started: Cannot all"):
                RewardPool(config(), ["exact"])
        assert psutil.Process().num_fds() == before


def test_what_functions_print_cannot_move_the_cursor(caplog):
    output = workers.Output()
    output.add("a\x1b[2J\u202e\tb\n".encode() + b"\xff\r\n" + "l\u00e4ngs".encode())
    with caplog.at_level(logging.INFO, logger="papo.reward"):
        output.show()
    assert caplog.messages == [
        r"verifier: a\x1b[2J\u202e  b",
        "verifier: \ufffd",
        "verifier: l\u00e4ngs",
    ]


def test_math_verify_has_nothing_to_say_about_its_timeouts(caplog):
    """The deadlines here take their place."""
    with (
        caplog.at_level(logging.INFO, logger="papo.reward"),
        RewardPool(config(workers=1), ["math_verify"]) as pool,
    ):
        assert [r.value for r in pool.score([completion("$2$", "1+1")])] == [1.0]
    assert caplog.messages == []


def test_nothing_outlives_a_killed_trainer(tmp_path):
    """Neither workers, of which one is stuck in C, nor what functions have started."""
    script = tmp_path / "trainer.py"
    script.write_text(
        f"""
import os, pathlib, signal, sys, threading, time
from tests.trainer import test_evil_verifiers as t

MARK, NAME = {str(tmp_path / "mark")!r}, {tmp_path.name!r}
SCRIPTED, EVIL = "tests.trainer.scripted:scripted", "tests.trainer.evil_verifiers:by_name"

pool = t.RewardPool(t.config(timeout_s=1000.0), [SCRIPTED, EVIL])
pool.score([t.completion(x, sleeper=NAME) for x in ("leaves_a_daemon", "leaves_children")])
batch = [t.completion("hang in C", mark=MARK)]
threading.Thread(target=pool.score, args=(batch,), daemon=True).start()
while not pathlib.Path(MARK).exists() or len(t.processes_named(NAME)) < 5:
    time.sleep(0.01)
print("up", *(w._marker for w in pool._workers._workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    up, *markers = done.stdout.split()
    assert (up, len(markers)) == ("up", 2)
    until = time.monotonic() + 60.0
    while processes_named(tmp_path.name) or any(map(family, markers)):
        assert time.monotonic() < until, "they are still there"


def test_without_proc_the_process_group_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as process:
        kill_family("nobody's", (process.pid,))
    assert process.returncode == -signal.SIGKILL


def test_a_signal_of_the_launcher_to_all_of_the_trainers_family_ends_no_worker(evil):
    """It sends SIGTERM to every descendant of a rank, whose step is still to be scored."""
    pool, _, _ = evil
    (before,) = pool.score([completion("own_process")])
    for process in psutil.Process().children(recursive=True):
        process.terminate()
    (after,) = pool.score([completion("own_process")])
    assert before == after and before.status == "ok"


def test_no_completion_pays_for_what_earlier_ones_have_used_up(evil):
    """The third finds no memory in its worker, and enough of it in a fresh one."""
    pool, _, _ = evil
    scored = pool.score([completion("hoards") for _ in range(4)])
    assert [(r.value, r.status) for r in scored] == [(0.5, "ok")] * 4
