"""`benchmarks.gpu_variants` on the CPU, with stand-ins for the GPU's kernels."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_variants
from benchmarks.gpu_check import rehearsal
from benchmarks.gpu_check.files import Notes
from benchmarks.shapes import Shape

SHAPE = Shape(2, 130, torch.bfloat16)


@pytest.fixture(autouse=True)
def rehearsed(monkeypatch):
    monkeypatch.setenv(rehearsal.ACTIVE, "1")
    monkeypatch.setattr(gpu_variants, "CHECKED", ((2, 130),))
    for name in ("TIMED", "GPU_TIMED"):
        monkeypatch.setattr(gpu_variants, name, (SHAPE,))
    monkeypatch.setattr(gpu_variants, "load_extension", lambda path: path.read_bytes())


def test_a_variant_is_checked_and_timed(tmp_path):
    (tmp_path / "a.so").touch()
    found = gpu_variants.apart(gpu_variants.times, tmp_path / "a.so", Notes(tmp_path / "a.json"))
    assert set(found) == {"times"}
    assert set(found["times"][SHAPE.name]) == {"copy", "stats", "loss", "narrow"}
    assert all(ms > 0 for ms in found["times"][SHAPE.name].values())


def test_a_variant_that_is_wrong_or_dies_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_variants.smoke, "line_of", lambda work, backend: "WRONG")
    (tmp_path / "a.so").touch()
    found = gpu_variants.apart(gpu_variants.times, tmp_path / "a.so", Notes(tmp_path / "a.json"))
    assert set(found["wrong"].values()) == {"WRONG"}
    absent = tmp_path / "absent.so"
    found = gpu_variants.apart(gpu_variants.times, absent, Notes(tmp_path / "b.json"))
    assert found == {"exit": 1}


def test_the_record_has_every_variant(tmp_path, monkeypatch):
    (tmp_path / "a.so").touch()
    options = [f"new={tmp_path / 'a.so'}", "--tiles", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["gpu_variants", *options])
    assert gpu_variants.main() == 0
    (path,) = Path(tmp_path / "out").glob("gpu-variants-*.json")
    assert set(json.loads(path.read_text())["variants"]["new"]["tiles"]) == {SHAPE.name}
    monkeypatch.setattr(sys, "argv", ["gpu_variants", "new=absent.so"])
    with pytest.raises(SystemExit, match="2"):
        gpu_variants.main()
