"""What the sweeps of `benchmarks.gpu_check` force, and so what a row of the table stands for."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_check import sweep
from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_workload import Workload
from benchmarks.shapes import Shape
from papo_kernels import tuning


@pytest.fixture
def forced_at(monkeypatch, tmp_path):
    """A sweep of the CUDA kernels whose best tile is "2,4,1,3,2": what was forced when each
    candidate of each task was timed, and the calls that were."""
    monkeypatch.setenv("PAPO_GPU_CHECK_REHEARSAL", "1")
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
