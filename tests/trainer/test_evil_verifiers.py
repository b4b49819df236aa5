"""Verifiers that no run may be ended or held up by, and what they leave behind."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from papo.errors import PapoError
from papo.reward import processes, workers
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
