"""`python -m benchmarks.gpu_check` without a GPU: a rehearsal of all calls, and the parts that
decide what is kept when something breaks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers, reference
from benchmarks.gpu_check import (
    build,
    counted,
    counters,
    files,
    rehearsal,
    runner,
    smoke,
    stages,
    table,
)
from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_check.runner import STOPPED, Runner, Stage, allowed, group_limit, groups
from benchmarks.gpu_workload import Workload
from benchmarks.shapes import Shape
from papo_kernels.backends import tuning

ROOT = Path(__file__).parents[1]
SCREEN = 12_000  # characters
PEER = """
from torch.nn.functional import cross_entropy

def linear_cross_entropy(hidden, weight, targets, filter_eps="high"):
    return cross_entropy((hidden @ weight.T).float(), targets)
"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> dict[str, Any]:
    """One rehearsal of all calls, with a peer's wheel and one that is none, whatever kernels the
    user has chosen: its output and what it wrote."""
    out, wheels = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("wheels")
    (wheels / "quack_kernels-1.0-py3-none-any.whl").write_bytes(b"no archive")
    chosen = {"PAPO_BACKEND": "none", "PAPO_TILE": "none", "PAPO_TRITON_CONFIG": "none"}
    with zipfile.ZipFile(wheels / "cut_cross_entropy-25.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("cut_cross_entropy/__init__.py", PEER)
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse"]
    command += ["--out", str(out), "--wheels", str(wheels)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=290, env=os.environ | chosen
    )
    (path,) = out.glob("gpu-check-*.json")
    return {"done": done, "out": out, "record": json.loads(path.read_text())}


@pytest.fixture
def rehearsing(monkeypatch):
    monkeypatch.setenv(rehearsal.ACTIVE, "1")


def planned(monkeypatch, work: Path) -> dict[int, list[Stage]]:
    """All calls of a machine that has every tool."""
    monkeypatch.setattr(stages, "beside_nvcc", lambda tool: shutil.which("true"))
    probe = [stages.probe()]
    return {
        1: [*probe, *stages.first_call("9.0", work)],
        2: [*probe, *stages.second_call("9.0", work, None, {})],
        3: [*probe, *stages.third_call("9.0")],
    }


# ---- the rehearsal ------------------------------------------------------------------------------


def test_every_stage_is_in_the_record(rehearsed, monkeypatch, tmp_path):
    assert rehearsed["done"].returncode == 0, rehearsed["done"].stdout + rehearsed["done"].stderr
    calls = planned(monkeypatch, tmp_path)
    record = rehearsed["record"]["stages"]
    assert "errors" not in rehearsed["record"]
    assert set(record) == {stage.name for call in calls.values() for stage in call}
    for name, stage in record.items():
        assert {"ok", "exit", "seconds", "tail"} <= set(stage), name


def test_a_fault_costs_its_own_stage_and_nothing_else(rehearsed):
    record = rehearsed["record"]["stages"]
    assert record["smoke-streamed"]["exit"] == "SIGABRT"
    assert record["timing-resident"]["exit"] == STOPPED
    assert record["linear"]["exit"] == 1
    assert "rehearsed failure of linear" in "\n".join(record["linear"]["tail"])
    tests = {"pytest-smoke", "tests-cuda", "tests-triton"}
    failed = {name for name, stage in record.items() if not stage["ok"]}
    assert failed == {"smoke-streamed", "timing-resident", "linear"} | tests
    for family in ("resident", "triton"):
        cases = record[f"smoke-{family}"]["result"]["cases"]
        assert cases and all(line.startswith("ok") for line in cases.values())
    for family in ("streamed", "triton"):
        for figures in record[f"timing-{family}"]["result"]["shapes"].values():
            assert {"copy", "stats", "loss"} == set(figures)
            assert {"ms", "q1", "q3", "GB/s", "of copy rate", "cycles/row"} <= set(figures["loss"])


def test_a_sweep_goes_on_behind_the_candidate_it_died_on(rehearsed):
    stage = rehearsed["record"]["stages"]["sweep-cuda"]
    assert stage["ok"] and stage["starts"] == 2
    tried = stage["result"]["tasks"]["tile [2,300] bfloat16"]["tried"]
    assert "died" in tried["2,4,1,3,2"]["error"]
    assert all("ms" in tried[name] for name in ("default", "1,4,1,3,2", "4,4,1,3,2"))
    names = [
        f"{field} {shape}"
        for shape in ("[2,300] bfloat16", "[1,520] bfloat16")
        for field in ("tile", "stats")
    ]
    assert list(stage["result"]["tasks"]) == names
    for entry in stage["result"]["tasks"].values():
        times = [ms for _, ms in entry["ranking"]]
        assert times == sorted(times) and times


def test_winners_stand_in_front_of_the_table(rehearsed):
    table = tuning.load(rehearsed["out"] / "tuning.json")
    old = tuning.load()
    new = [row for row in table["cuda"] if row.measured]
    assert new and table["cuda"][len(new) :] == old["cuda"]
    for row in new:
        assert row.source["measured"].startswith("benchmarks/results/gpu-check-")
        assert {"date", "device"} <= set(row.source)
        assert row.columns[0] <= row.columns[1]


def test_what_it_ran_under_is_in_the_record(rehearsed):
    environment = rehearsed["record"]["environment"]
    names = {"torch", "python", "nvcc", "driver", "gpu", "SM MHz", "memory MHz", "commit"}
    assert names <= set(environment)
    probe = rehearsed["record"]["stages"]["probe"]["result"]
    assert {"before", "after", "copy", "product", "wide products", "active clusters"} <= set(probe)
    kernels = rehearsed["record"]["stages"]["build"]["result"]["normal"]["kernels"]
    assert kernels[0]["registers"] == 126 and kernels[0]["spills"] == 0


def test_what_comes_back_is_little(rehearsed):
    found = list(rehearsed["out"].iterdir())
    assert len(found) <= 8 and not any(path.suffix == ".part" for path in found)
    assert all(path.stat().st_size < 16 * 2**20 for path in found)
    with tarfile.open(rehearsed["out"] / "logs.tar.gz") as archive:
        logs = {Path(name).name for name in archive.getnames()}
        first = archive.extractfile("logs/probe.log").read().decode()
    assert {f"{name}.log" for name in rehearsed["record"]["stages"]} <= logs
    assert not any(str(ROOT) in text for text in (json.dumps(rehearsed["record"]), first))
    assert first.startswith("$ python -m benchmarks.gpu_check.worker probe")
    assert "ncu-resident-loss-source.csv" in logs


def test_the_table_is_printed_last(rehearsed):
    text = (rehearsed["out"] / "gpu-check.txt").read_text()
    assert rehearsed["done"].stdout.endswith(text + "\n")
    assert len(text) < SCREEN / 2
    stages = rehearsed["record"]["stages"].items()
    words = {
        name: "skipped" if "skipped" in s else "ok" if s["ok"] else "FAILED" for name, s in stages
    }
    assert all(f"{name} {word} " in text for name, word in words.items())
    for part in ("Rehearsed GPU", "tile [2,300] bfloat16", "ncu resident-loss", "linear FAILED"):
        assert part in text


def test_failures_of_tests_are_named(rehearsed):
    for name in ("pytest-smoke", "tests-cuda", "tests-triton"):
        (line,) = rehearsed["record"]["stages"][name]["failures"]
        assert "test_that_fails" in line and "as rehearsed" in line


def test_peers_come_from_wheels_or_are_named(rehearsed):
    result = rehearsed["record"]["stages"]["peers"]["result"]
    assert result["wheels"] == ["cut_cross_entropy-25.1-py3-none-any.whl"]
    figures = result["results"]["[8,16]x[64] bfloat16"]["figures"]
    assert any(name.startswith("CCE") for name in figures)
    assert any(name.startswith("liger_kernel") for name in result["unavailable"])
    reason = result["unavailable"]["quack_kernels-1.0-py3-none-any.whl"]
    assert reason == "BadZipFile: File is not a zip file"
    compiled = [
        name for name in result["results"]["[2,300] bfloat16"]["figures"] if "compile" in name
    ]
    assert len(compiled) == 2


@pytest.mark.needs("the extension here")
def test_the_smoke_stage_loads_its_own_build(rehearsed):
    assert rehearsed["record"]["stages"]["smoke-resident"]["result"]["variant"] == "smoke"


# ---- budgets ------------------------------------------------------------------------------------


def test_the_limits_of_a_call_add_up_to_its_budget(monkeypatch, tmp_path):
    assert stages.BUDGETS == {0: 570, 1: 270, 2: 360, 3: 280}
    for call, plan in planned(monkeypatch, tmp_path).items():
        assert sum(map(group_limit, groups(plan))) <= stages.BUDGETS[call]
        assert len({stage.name for stage in plan}) == len(plan)


def test_stages_are_chosen_by_name_or_kind(monkeypatch, tmp_path):
    plan = [stage for part in planned(monkeypatch, tmp_path).values() for stage in part]
    names = [stage.name for stage in stages.only(plan, ("sweep", "tests-cuda"))]
    assert names == ["sweep-cuda", "sweep-triton", "tests-cuda"]
    with pytest.raises(ValueError, match=r"--stages: expected some of .*sweep-cuda.*; got 'swe'"):
        stages.only(plan, ("swe",))


def test_a_late_stage_gets_less_and_an_elastic_one_what_is_left_over():
    rigid, elastic = Stage("a", 10), Stage("b", 10, elastic=True)
    vital = Stage("c", 10, vital=True)
    assert allowed([rigid], later=50, left=100) == 10
    assert allowed([elastic], later=50, left=65) == 15
    assert allowed([elastic], later=50, left=100) == 20, "no more than twice its limit"
    assert allowed([elastic], later=50, left=55) == 10, "the time of others is theirs"
    assert allowed([vital], later=50, left=55) == 20
    assert allowed([rigid], later=0, left=4) == 4
    assert allowed([rigid], later=0, left=-1) == 0


def test_a_call_without_kernels_that_failed_compares_the_others():
    assert stages.healthy({}) == "cuda,triton"
    assert stages.healthy({"smoke-resident": {"ok": False}}) == "triton"
    assert stages.healthy({"smoke-streamed": {"ok": False}}) == "cuda,triton"


# ---- workers ------------------------------------------------------------------------------------


def test_a_worker_can_be_a_program_of_its_own(tmp_path, rehearsing):
    check = Runner(tmp_path / "work", tmp_path / "out", "record", 120)
    check.fork = False
    check.run([Stage("one", 100, ("counted", "resident-narrowing"))])
    assert check.stages["one"]["ok"], check.stages["one"]


# ---- files --------------------------------------------------------------------------------------


def test_a_long_log_keeps_its_beginning_and_more_of_its_end():
    data = b"first line\n" + b"x" * 10_000 + b"\nlast line"
    short = files.clipped(data, 1000)
    assert len(short) <= 1000 and b"left out" in short
    assert short.startswith(b"first line") and short.endswith(b"last line")
    assert files.clipped(data, len(data)) == data
    assert len(files.clipped(data, 10)) <= 10


def test_short_files_get_all_they_need():
    assert files.shares([10, 2000, 3000], 1010, 5000) == [10, 500, 500]
    assert files.shares([10, 20], 1000, 15) == [10, 15]
    assert files.shares([], 1000, 15) == []


def test_an_archive_stays_below_its_limit(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    for i in range(5):
        (logs / f"{i}.log").write_bytes(os.urandom(50_000))  # does not compress
    (logs / "short.log").write_text("whole")
    files.pack(logs, tmp_path / "logs.tar.gz", most=100_000, each=30_000)
    assert (tmp_path / "logs.tar.gz").stat().st_size < 110_000
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        member = archive.extractfile("logs/short.log")
        assert member is not None and member.read() == b"whole"
        assert len(archive.getnames()) == 6


def test_a_table_fits_the_screen_whatever_is_in_the_record(rehearsed):
    record = json.loads(json.dumps(rehearsed["record"]))
    for stage in record["stages"].values():
        stage["failures"] = ["x" * 500] * 40
        stage["under way"] = ["y" * 500] * 40
    tasks = record["stages"]["sweep-cuda"]["result"]["tasks"]
    entry = tasks["tile [2,300] bfloat16"]
    tasks.update({f"tile {i}": entry for i in range(200)})
    text = table.text(record)
    assert len(text) <= SCREEN
    assert "linear FAILED" in text, "every section keeps a part"


def test_what_trainers_compute_without_a_kernel_is_float32():
    logits = torch.randn(2, 9).bfloat16()
    for result in reference.logp_entropy_float32(logits, torch.tensor([3, 8])):
        assert result.dtype == torch.float32


def test_peers_are_unpacked_from_wheels(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with zipfile.ZipFile(tmp_path / "papo_test_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("papo_test_peer.py", "answer = 42\n")
    assert peers.use_wheels(tmp_path, tmp_path / "into") == ["papo_test_peer-1.0-py3-none-any.whl"]
    assert peers.imported("papo_test_peer", "answer") == 42
    monkeypatch.setattr(peers, "unavailable", {})
    assert peers.imported("papo_test_no_peer", "answer") is None
    assert "papo_test_no_peer" in peers.unavailable


# ---- tests that fail ----------------------------------------------------------------------------

SUITE = """
import os, signal
def test_passes(): pass
def test_fails(): assert 1 == 2, "why"
def test_dies(): os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.needs("xdist"))])
def test_failures_are_written_as_they_happen(workers, tmp_path):
    """The third test ends its process: without workers nothing else could tell of the second."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    path = tmp_path / "failures"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest"]
    command += ["-p", "benchmarks.gpu_check.failures", "-c", os.devnull, f"--rootdir={tmp_path}"]
    command += [str(tmp_path), "-n", str(workers)] if workers else [str(tmp_path)]
    variables = {**os.environ, "PAPO_FAILURES": str(path)}
    subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, timeout=120)
    lines = sorted(path.read_text().splitlines(), reverse=True)
    assert lines[0].startswith("test_suite.py::test_fails: AssertionError: why")
    if workers:
        assert len(lines) == 2 and "test_dies" in lines[1] and "crashed" in lines[1]
    else:
        running = (tmp_path / "failures.running").read_text()
        assert running == "test_suite.py::test_dies\n"


# ---- what the stages do -------------------------------------------------------------------------


def test_ptxas_and_ncu_are_read():
    (kernel,) = build.kernels(rehearsal._PTXAS)
    assert kernel == {
        "kernel": "_Z15resident_kernelv",
        "registers": 126,
        "stack": 0,
        "spills": 0,
    }
    assert build.summary([{**kernel, "spills": 8}]).endswith("spills in _Z15resident_kernelv")
    (launch,) = counters.parsed("==PROF== connected\n" + rehearsal._NCU)
    found = counters.summary([launch], "resident-loss")
    assert (found["MB read"], found["MB written"], found["GB/s"]) == (0.0025, 0.0012, 0.925)
    elements = 2304 * 151936
    assert counted.model_bytes("resident-narrowing") == (4 * elements, 2 * elements)


@pytest.mark.parametrize("case", [name for name in counted.CASES if "triton" not in name])
def test_what_a_profiler_looks_at_runs(case, rehearsing, tmp_path):
    assert counted.run(Notes(tmp_path / "notes.json"), case) == 0


def test_an_output_that_nothing_wrote_is_wrong():
    exact = torch.tensor([[1.0, -2.0], [3.0, 0.0]], dtype=torch.float64)
    assert smoke.compare("x", exact.float(), exact).share == 0.0
    assert smoke.compare("x", exact.float() + 1e-4, exact).share > 1.0
    unwritten = exact.float()
    unwritten[1, 1] = torch.nan
    assert smoke.compare("x", unwritten, exact).share == torch.inf
    assert smoke.compare("x", unwritten.bfloat16(), exact, by_row=True).share == torch.inf
    assert smoke.compare("x", exact.bfloat16(), exact, by_row=True).share <= 1.0


def test_outputs_start_as_nan():
    """In a process of its own: the setting holds for all of it."""
    code = "import torch; from benchmarks.gpu_check import smoke; smoke.poison();"
    code += "x = torch.zeros(2, 3); made = [torch.empty(9), x.new_empty(9), torch.empty_like(x)];"
    code += "assert all(y.isnan().all() for y in made)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_old_logp_comes_from_no_kernel_under_test(monkeypatch):
    for name in ("token_stats", "policy_loss"):
        monkeypatch.setattr(f"benchmarks.gpu_workload.{name}", None)
    work = Workload(Shape(5, 40, torch.bfloat16), torch.device("cpu"))
    exact = torch.log_softmax(work.logits.double(), 1).gather(1, work.targets[:, None])[:, 0]
    torch.testing.assert_close(work.plain.double(), exact, rtol=1e-5, atol=1e-5)


def test_clearing_keeps_what_was_built(tmp_path):
    for name in ("logs/x.log", "record.json", "build-normal/build.ninja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    runner.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["build-normal"]
