"""How `benchmarks.gpu_check` runs its stages: processes that end, hang, die or were never there."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import stages, table
from benchmarks.gpu_check.runner import STOPPED, Runner, Stage


@pytest.fixture
def one(tmp_path):
    """Runs one stage, a shell's, and gives its outcome."""

    def run(script: str, limit: float = 30.0, budget: float = 60.0, **options: Any) -> dict:
        check = Runner(tmp_path / "work", tmp_path / "out", "record", budget)
        check.run([Stage("one", limit, command=("sh", "-c", script), **options)])
        assert json.loads((tmp_path / "out" / "record.json").read_text()) == check.record
        return check.stages["one"]

    return run


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_stage_started_ends_with_it(one):
    outcome = one("sleep 1000 & echo $!")
    assert outcome["ok"]
    pid = int(outcome["tail"][1])
    give_up = time.monotonic() + 10
    while alive(pid) and time.monotonic() < give_up:
        os.sched_yield()
    assert not alive(pid)


def test_a_stage_that_hangs_is_stopped_with_what_it_started(one):
    outcome = one("sleep 1000 & echo $!; wait", limit=2.0)
    assert not outcome["ok"] and outcome["exit"] == STOPPED
    pid = int(outcome["tail"][1])
    give_up = time.monotonic() + 10
    while alive(pid) and time.monotonic() < give_up:
        os.sched_yield()
    assert not alive(pid)


def test_a_program_that_is_not_there_is_a_failed_stage(tmp_path):
    check = Runner(tmp_path / "work", tmp_path / "out", "record", 60)
    check.run(
        [Stage("absent", 10, command=("no-such-program",)), Stage("next", 10, command=("true",))]
    )
    assert "no-such-program" in "\n".join(check.stages["absent"]["tail"])
    assert check.stages["absent"]["exit"] == 1 and check.stages["next"]["ok"]


def test_a_stage_for_which_no_time_is_left_is_skipped_by_name(one):
    outcome = one("true", budget=0.5)
    assert outcome == {"ok": False, "skipped": "no time is left for it"}


def test_a_tool_that_is_not_there_is_skipped_by_name(one, monkeypatch):
    monkeypatch.setattr(stages, "beside_nvcc", lambda tool: None)
    (stage,) = stages._sanitizers()
    outcome = one("exit 1", absent=stage.absent, required=False)
    assert outcome["ok"] and outcome["skipped"].startswith("compute-sanitizer")


def test_a_stage_is_begun_anew_while_it_gets_on(one):
    """Three starts: two that write their notes and fail, one that adds nothing."""
    script = (
        'n=$(cat "$PAPO_GPU_CHECK_WORK/n" 2>/dev/null || echo 0); echo start $n;'
        'if [ $n -lt 2 ]; then echo $((n + 1)) > "$PAPO_GPU_CHECK_WORK/n";'
        'echo "{\\"n\\": $n}" > "$PAPO_GPU_CHECK_NOTES"; fi; exit 7'
    )
    outcome = one(script, restarts=True)
    assert outcome["exit"] == 7 and outcome["starts"] == 3
    assert outcome["result"] == {"n": 1}
    starts = [line for line in outcome["tail"] if line.startswith("start")]
    assert starts == ["start 0", "start 1", "start 2"]


def test_an_error_in_digesting_a_stage_stops_nothing(tmp_path):
    check = Runner(tmp_path / "work", tmp_path / "out", "record", 60)

    def after(runner: Runner, name: str) -> None:
        raise KeyError(name)

    check.run([Stage("a", 10, command=("true",)), Stage("b", 10, command=("true",))], after)
    assert check.stages["a"]["ok"] and check.stages["b"]["ok"]
    assert check.record["errors"]["after a"][-1] == "KeyError: 'a'"
    assert "after b: KeyError: 'b'" in table.text(check.record)


def test_stages_together_run_at_the_same_time(tmp_path):
    """Each waits for the other's mark."""
    meet = "touch $0; while [ ! -e $1 ]; do :; done"
    check = Runner(tmp_path / "work", tmp_path / "out", "record", 60)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    check.run(
        [
            Stage("a", 20, command=("sh", "-c", meet, a, b)),
            Stage("b", 20, command=("sh", "-c", meet, b, a), together=True),
        ]
    )
    assert check.stages["a"]["ok"] and check.stages["b"]["ok"]
