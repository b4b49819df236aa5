"""How `benchmarks.gpu_check` runs its stages: processes that end, hang, die or were never there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import __main__ as check
from benchmarks.gpu_check import build, facts, rehearsal, runner, stages, table
from benchmarks.gpu_check.files import portable
from benchmarks.gpu_check.runner import INTERRUPTED, STOPPED, Runner, Stage
from benchmarks.harness import save_json

ROOT = Path(__file__).parents[1]


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


# ---- what ends or precedes a check --------------------------------------------------------------

# A stage whose processes would outlast the one that runs it.
INTERRUPTIBLE = """
import sys
import sysconfig
from pathlib import Path
from benchmarks.gpu_check.runner import Runner, Stage, heed_signals
heed_signals()
work = Path(sys.argv[1])
script = "sleep 1000 & echo $$ $! >pids; mv pids begun; wait"
stage = Stage("one", 100, command=("sh", "-c", f"cd {work}; {script}"))
Runner(work, work / "out", "record", 100).run([stage])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_stage_too_and_the_record_is_kept(number, tmp_path):
    command = [sys.executable, "-c", INTERRUPTIBLE, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        give_up = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < give_up:
            os.sched_yield()
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    pids = [int(pid) for pid in (tmp_path / "begun").read_text().split()]
    while any(map(alive, pids)) and time.monotonic() < give_up:
        os.sched_yield()
    assert len(pids) == 2 and not any(map(alive, pids))
    (stage,) = json.loads((tmp_path / "out" / "record.json").read_text())["stages"].values()
    assert not stage["ok"] and stage["exit"] == INTERRUPTED


def test_a_stage_can_be_ended_by_the_signals_that_the_check_heeds(one, monkeypatch):
    monkeypatch.setattr(runner, "_received", [])
    before = {number: signal.getsignal(number) for number in runner._HANDLED}
    try:
        runner.heed_signals()
        assert one("kill -TERM $$")["exit"] == "SIGTERM"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs a call whose stages are a probe, of a device of the given name, and one that passes."""

    def run(number: int, device: str | None, digest: str = "same") -> tuple[int, dict[str, Any]]:
        notes = json.dumps({"device": {"name": device, "capability": "9.0"}} if device else {})
        script = ("sh", "-c", 'echo "$0" >"$PAPO_GPU_CHECK_NOTES"', notes)
        passing = lambda *_: [Stage(f"stage-{number}", 20, command=("true",))]  # noqa: E731
        monkeypatch.setattr(stages, "probe", lambda: Stage("probe", 20, command=script))
        monkeypatch.setattr(stages, "first_call", passing)
        monkeypatch.setattr(stages, "second_call", passing)
        monkeypatch.setattr(stages, "third_call", passing)
        monkeypatch.setattr(facts, "sources", lambda: digest)
        for folder in ("work", "out", "results"):
            (tmp_path / folder).mkdir(exist_ok=True)
        folders = tmp_path / "work", tmp_path / "out", None, tmp_path / "results"
        status = check.run_call(number, *folders)
        return status, json.loads((tmp_path / "work" / "record.json").read_text())["stages"]

    return run


def test_only_a_record_of_a_device_is_a_result(call, tmp_path):
    assert call(1, None)[0] == 1
    assert not list((tmp_path / "results").iterdir())
    assert call(1, "NVIDIA H200")[0] == 0 == call(1, "NVIDIA A100-SXM4-80GB")[0]
    assert call(1, None)[0] == 1
    names = sorted(path.name[:-16] for path in (tmp_path / "results").iterdir())
    assert names == ["gpu-check-a100-sxm4-80gb", "gpu-check-h200"]
    for path in (tmp_path / "results").iterdir():
        assert json.loads(path.read_text())["stages"]["probe"]["result"]["device"]


def test_a_later_call_adds_to_what_the_same_code_gave_on_the_same_device(call):
    call(1, "NVIDIA H200")
    assert set(call(2, "NVIDIA H200")[1]) == {"probe", "stage-1", "stage-2"}
    assert set(call(2, "NVIDIA H100")[1]) == {"probe", "stage-2"}
    assert set(call(3, "NVIDIA H100")[1]) == {"probe", "stage-2", "stage-3"}
    call(1, "NVIDIA H200")
    assert set(call(2, "NVIDIA H200", digest="other")[1]) == {"probe", "stage-2"}


@pytest.mark.parametrize("text", ['{"stages": {"probe"', "[]", "{}", '{"stages": {"probe": 1}}'])
def test_a_record_that_is_not_whole_counts_as_none(text, call, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "record.json").write_text(text)
    status, found = call(2, "NVIDIA H200")
    assert status == 0 and set(found) == {"probe", "stage-2"}


def test_sources_are_told_apart_by_their_contents(tmp_path):
    names = ("CMakeLists.txt", "csrc/a.cu", "papo_kernels/tuning.json", "benchmarks/a.py")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    seen = [facts.sources(tmp_path)]
    (tmp_path / "benchmarks" / "result.json").write_text("{}")
    assert facts.sources(tmp_path) == seen[0]
    for name in names:
        (tmp_path / name).write_text("changed")
        seen.append(facts.sources(tmp_path))
    assert len(set(seen)) == 5


@pytest.mark.parametrize("wrong", ["--wheels", "--out"])
def test_a_folder_that_is_none_is_an_error_before_anything_starts(wrong, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["gpu_check", wrong, str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="2"):
        check.arguments()


def test_a_stage_of_another_call_is_an_error_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--call", "3", "--stages", "sweep"])
    with pytest.raises(SystemExit, match="2"):
        check.arguments()
    assert "expected some of build-for-training" in capsys.readouterr().err


def test_a_rehearsal_stays_off_the_folder_of_measurements(monkeypatch):
    seen = []
    monkeypatch.setattr(check, "run_call", lambda *arguments: seen.append(arguments) or 0)
    monkeypatch.setattr(check, "heed_signals", lambda: None)
    monkeypatch.setattr(rehearsal, "prepare", lambda *_: None)
    monkeypatch.setattr(check.os, "environ", dict(os.environ))
    for options in ([], ["--rehearse"]):
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--call", "2", *options])
        assert check.main() == 0
    (_, work, out, _, results, _), (_, other_work, other_out, *none, _) = seen
    assert results == ROOT / "benchmarks" / "results" and not any(none)
    assert work != other_work and out != other_out and work not in other_work.parents


def test_one_rehearsed_call_is_judged_by_its_own_stages(monkeypatch):
    monkeypatch.setenv(rehearsal.FAULTS, json.dumps({"smoke": "abort", "sweep|a|b": "abort"}))
    passed, failed = {"ok": True}, {"ok": False}
    tests = {"ok": False, "failures": ["test_that_fails"]}
    assert rehearsal.as_planned({"peers": passed, "tests": tests})
    assert rehearsal.as_planned({"smoke": failed})
    assert not rehearsal.as_planned({"smoke": passed})
    assert not rehearsal.as_planned({"smoke": failed, "peers": failed})


def test_the_run_of_cuda_has_no_tests_of_triton_alone(monkeypatch, tmp_path):
    """As pytest collects them."""
    monkeypatch.setattr(stages, "beside_nvcc", lambda tool: None)
    plan = {stage.name: stage.command for stage in stages.second_call("9.0", tmp_path, None, {})}
    command = [*plan["tests-cuda"], "--collect-only"]
    command += ["-n", "0"] if "-n" in command else []
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    tests = [line for line in collected.stdout.splitlines() if "::" in line]
    assert len(tests) > 100 and all("cuda" in test for test in tests)


def test_a_tool_that_hangs_when_asked_for_its_options_is_left(monkeypatch, tmp_path):
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\nexec sleep 1000\n")
    tool.chmod(0o755)
    monkeypatch.setattr(stages, "HELP_SECONDS", 0.2)
    assert stages._help(str(tool)) == ""


def test_paths_of_the_machine_are_left_out(monkeypatch):
    text = f"$ {sys.executable} -m x\n{ROOT}/a.py:1 -I{ROOT}/b {ROOT}-other in {ROOT}"
    assert portable(text) == f"$ python -m x\n./a.py:1 -I./b {ROOT}-other in ."
    monkeypatch.setattr(sys, "base_prefix", "/opt/python")
    monkeypatch.setattr(sys, "prefix", "/opt/python/.venv")
    text = "/opt/python/.venv/lib/a.py /opt/python/lib/b.py /usr/lib/c.py"
    assert portable(text) == "PREFIX/lib/a.py BASE/lib/b.py /usr/lib/c.py"


def test_outcomes_are_wrapped():
    outcome = {"ok": False, "exit": STOPPED, "seconds": 1.0}
    record = {"stages": {f"a-long-name-of-a-stage-{i:02}": outcome for i in range(30)}}
    lines = table.text(record).splitlines()
    assert all(len(line) <= table.WIDTH for line in lines)
    for i in range(30):
        assert f"stage-{i:02} FAILED ({STOPPED}) 1 s" in "\n".join(lines)


def test_a_build_counts_where_it_is_of_these_sources_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "target_folder", lambda variant, work: work / variant)
    suffix = build._made_of("")["suffix"]
    stamp, library = build._stamp("normal", tmp_path), tmp_path / "normal" / f"_C{suffix}"
    for path in (stamp, library):
        path.parent.mkdir()
    shutil.copy(next((ROOT / "papo_kernels").glob(f"_C{suffix}")), library)

    def stamped() -> None:
        made = {**build._made_of("90a-real"), "library": build._digest(library)}
        save_json(stamp, {**made, "exit": 0, "kernels": []})

    stamped()
    assert build.built_before("normal", "90a-real", tmp_path)["exit"] == 0
    assert not build.built_before("normal", "80-real", tmp_path)
    library.write_bytes(library.read_bytes() + b"another build")
    assert not build.built_before("normal", "90a-real", tmp_path)
    library.write_bytes(b"no library")
    stamped()
    assert not build.built_before("normal", "90a-real", tmp_path)


def test_a_record_of_other_sources_is_kept(tmp_path):
    out, results = tmp_path / "out", tmp_path / "results"
    for folder in (out, results):
        folder.mkdir()
    for digest in ("first", "second", "second"):
        save_json(out / "gpu-check.json", {"environment": {"sources": digest}})
        check.publish(out / "gpu-check.json", results)
    assert {path.name for path in results.iterdir()} == {"gpu-check.json", "gpu-check-first.json"}
