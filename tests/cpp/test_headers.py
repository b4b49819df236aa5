"""Compiles and runs the tests of csrc/include/papo, with nothing but a C++ compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INCLUDE = HERE.parents[1] / "csrc" / "include"
STRICT = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", str(INCLUDE)]


def compile_cpp(cxx: list[str], source: Path, output: Path, *flags: str) -> None:
    command = [*cxx, *STRICT, *flags, str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["headers_test", "policy_loss_test"])
@pytest.mark.parametrize("flags", [("-O2",), ("-O1", "-fsanitize=undefined")], ids=["O2", "ubsan"])
def test_headers(flags, name, cxx, tmp_path):
    program = tmp_path / name
    compile_cpp(cxx, HERE / f"{name}.cpp", program, *flags)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "passed\n", done.stdout + done.stderr
    assert done.stderr == "", done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("header", sorted(p.name for p in (INCLUDE / "papo").glob("*.h")))
def test_each_header_compiles_alone(header, cxx, tmp_path):
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "papo/{header}"\n#include "papo/{header}"\n')
    compile_cpp(cxx, source, tmp_path / "alone.o", "-c")
