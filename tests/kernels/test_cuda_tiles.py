"""The CUDA backend's index arithmetic and the order of merges, by C++ programs on the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.needs("g++")
@pytest.mark.parametrize("name", ["tile_walk", "merge_order"])
def test_program(name, tmp_path):
    program = tmp_path / name
    source = ROOT / f"tests/cpp/{name}.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Icsrc/include"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], cwd=ROOT, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
