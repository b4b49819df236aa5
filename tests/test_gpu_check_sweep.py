"""The sweeps of `benchmarks.gpu_check`: what they try and force, and so what a row of the table
stands for."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import rehearsal, sweep, target, tiles, warm, winners
from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_workload import Workload
from benchmarks.shapes import GPU_TIMED, Shape
from papo_kernels.backends import tuning
from tests.kernels.cuda_emulator import emulated


@pytest.fixture
def rehearsing(monkeypatch):
    monkeypatch.setenv(rehearsal.ACTIVE, "1")


@pytest.fixture
def forced_at(rehearsing, monkeypatch, tmp_path):
    """A sweep of the CUDA kernels whose best tile is "2,4,1,3,2": what was forced when each
    candidate of each task was timed, and the calls that were."""
    monkeypatch.setattr(sweep, "swept_shapes", lambda: [Shape(2, 40, torch.bfloat16)])
    seen: dict[tuple[str, str], tuple[tuple[str, ...], tuple[object, ...]]] = {}

    def timed(self: sweep.Sweep, task: sweep.Task, work: Workload) -> dict[str, float]:
        _, candidate = self.notes.data["now"]
        seen[task.field, candidate] = task.timed, tuple(tuning.forced())
        return {"ms": 1.0 if candidate in ("2,4,1,3,2", "1,4,2") else 2.0}

    monkeypatch.setattr(sweep.Sweep, "_time", timed)
    sweep.sweep_cuda(sweep.Sweep(Notes(tmp_path / "notes.json"), "sweep-cuda", "reference"))
    return seen


def test_what_is_derived_is_timed_beside_what_its_candidates_are(forced_at):
    best = (2, 4, 1, 3, 2)
    assert forced_at["tile", "default"][1] == ("resident", None, None)
    assert forced_at["tile", "2,4,1,3,2"][1] == ("resident", best, None)
    assert forced_at["stats", "default"][1] == ("resident", best, None)
    assert forced_at["stats", "1,4,2"][1] == ("resident", best, (1, 4, 2))


def test_a_tile_is_judged_with_the_statistics_that_it_leaves(forced_at):
    """A tile whose slices take several buffers turns the statistics' own kernel off."""
    for (field, candidate), (timed, forced) in forced_at.items():
        assert timed == (("loss", "stats") if field == "tile" else ("stats",)), candidate
        assert field == "stats" or forced[2] is None, candidate


def test_a_tile_with_other_bits_is_disqualified(rehearsing, monkeypatch):
    work = Workload(Shape(3, 40, torch.bfloat16), torch.device("cpu"))
    expected = sweep.Expected(work)
    assert expected.fault(work, "reference") == ""
    stats = work.stats("reference")
    nudged = stats._replace(logp=torch.nextafter(stats.logp, torch.zeros(3)))
    monkeypatch.setattr(work, "stats", lambda backend: nudged)
    assert "bit" in expected.fault(work, "reference")
    monkeypatch.undo()
    expected.logp += 1e-3
    assert expected.fault(work, "reference") == "logp is wrong"
    expected.logp -= 1e-3
    expected.gradient *= 1.1
    assert expected.fault(work, "reference") == "the gradient is wrong"


@pytest.mark.needs("g++")
def test_tiles_are_forced_on_the_kernels_themselves(rehearsing, tmp_path):
    """On the emulated machine: some candidates run and have the loss's bits, others are refused
    with a reason."""
    shape = Shape(3, 3000, torch.bfloat16)
    work = Workload(shape, torch.device("cpu"))
    with emulated():
        trial = sweep.Sweep(Notes(tmp_path / "notes.json"), "sweep-cuda", "cuda")
        resident = {"PAPO_KERNEL": "resident"}
        task = sweep.Task(shape, "tile", "PAPO_TILE", ("loss", "stats"), resident)
        best = trial.run(task, ["2,1,1,3,2", "4,1,1,3,2", "3,1,1,3,2", "nonsense"], work)
        tried = trial.notes.data["tasks"][task.name]["tried"]
        assert all("ms" in tried[name] for name in ("default", "2,1,1,3,2", "4,1,1,3,2")), tried
        assert all("ValueError" in tried[name]["error"] for name in ("3,1,1,3,2", "nonsense"))
        assert best in ("2,1,1,3,2", "4,1,1,3,2", sweep.DEFAULT)
    assert "PAPO_TILE" not in os.environ


def test_candidates_keep_the_kernels_limits():
    for shape in GPU_TIMED:
        found = tiles.loss_tiles(shape.vocab, shape.dtype.itemsize)
        assert len(found) == len(set(found)) and 50 < len(found) < 300
        for text in found:
            cluster, warps, stages_, ring, blocks = map(int, text.split(","))
            buffer = -(-shape.vocab // cluster) * shape.dtype.itemsize / stages_
            assert stages_ < ring <= tiles.MOST_BUFFERS and warps * blocks <= 16
            assert ring * buffer <= min(227, 228 / blocks - 1) * 1024
    # What the launcher derives for the main vocabulary is among them.
    assert "8,4,1,3,2" in tiles.loss_tiles(151936, 2)


def entry(field: str, columns: int, **times: float) -> dict[str, Any]:
    tried = {name.replace("_", ","): {"ms": ms} for name, ms in times.items()}
    return {
        "field": field,
        "backend": "cuda",
        "dtype": "bfloat16",
        "columns": columns,
        "last column": -(-columns // 8192) * 8192,
        "tried": {**tried, "broken": {"error": "ValueError: does not fit"}},
    }


def test_winners_become_rows_that_do_not_overlap(tmp_path):
    result = {
        "devices": ["NVIDIA H200", "sm_90"],
        "tasks": {
            "a": entry("tile", 32000, **{"1_4_1_3_2": 2.0, "2_4_1_3_2": 1.0, "default": 1.5}),
            "b": entry("stats", 32000, **{"1_3_2": 0.5, "2_4_2": 0.6, "default": 0.7}),
            "c": entry("tile", 128256, **{"8_4_1_3_2": 1.0}),
            "d": entry("tile", 128300, **{"4_4_1_3_2": 1.0}),
            "e": entry("tile", 151936, **{"8_8_1_3_1": 1.2, "default": 1.0}),
        },
    }
    source = {"measured": "benchmarks/results/gpu-check-2026-01-01.json", "date": "2026-01-01"}
    assert winners.save([result], source, tmp_path / "tuning.json") == {"cuda": 3}
    rows = tuning.load(tmp_path / "tuning.json")["cuda"]
    new = [row for row in rows if row.measured]
    assert [row.columns for row in new] == [(16001, 32768), (64129, 128299), (128300, 131072)]
    assert new[0].config == {"tile": [2, 4, 1, 3, 2], "stats": [1, 3, 2]}
    assert new[1].config == {"tile": [8, 4, 1, 3, 2], "stats": None}
    assert all(row.device == "NVIDIA H200" == row.source["device"] for row in new)
    winners.rank(result)
    assert result["tasks"]["a"]["ranking"][0] == ("2,4,1,3,2", 1.0)


def test_forcing_is_undone(rehearsing, monkeypatch):
    monkeypatch.setenv("PAPO_TILE", "1,1,1,2,1")
    monkeypatch.delenv("PAPO_KERNEL", raising=False)
    with target.forced({"PAPO_TILE": "2,4,1,3,2", "PAPO_KERNEL": "resident"}):
        assert tuning.forced().tile == (2, 4, 1, 3, 2) and tuning.forced().kernel == "resident"
    assert tuning.forced().tile == (1, 1, 1, 2, 1) and tuning.forced().kernel is None
    monkeypatch.undo()
    tuning.forced.cache_clear()


@pytest.mark.needs("triton")
def test_every_candidate_of_triton_is_compiled_before_it_is_timed():
    """At each number of columns: with these the table's configuration changes, and with it what a
    candidate leaves open."""
    children = warm.jobs()
    compiled = {(job.shape.vocab, job.config) for jobs in children for job in jobs}
    for shape in sweep.swept_shapes():
        for config in ("", *tiles.triton_configs(shape.dtype, shape.vocab)):
            assert (shape.vocab, config) in compiled
    rows = {job.shape.rows for jobs in children for job in jobs if job.config}
    assert rows == {sweep.WHOLE_ROWS}
