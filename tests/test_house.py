"""The habits of the house that can be checked: sizes, who may do what, tests and their skips."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.test_layout import ROOT, SOURCES, TRAIN, module_name

CSRC = ROOT / "csrc"
NATIVE = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


# ---- who may do what ----------------------------------------------------------------------------


def test_only_ops_register_with_torch():
    registering = re.compile(r"custom_op\(|torch\.library\.|from torch\.library|TORCH_LIBRARY")
    found = {
        str(path.relative_to(ROOT)) for path in SOURCES if registering.search(path.read_text())
    }
    assert found
    assert all(re.fullmatch(r"papo_kernels/ops/\w+\.py", name) for name in found), found


def test_trust_remote_code_and_pickle():
    """Nothing is unpickled but what a trainer sends to its own reward workers; nothing runs a
    downloaded model's code unasked."""
    pickles = {ROOT / "papo" / "reward" / name for name in ("worker.py", "workers.py")}
    for path in [*SOURCES, TRAIN]:
        text = path.read_text()
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path}: {call}"
        assert not re.search(r"trust_remote_code\s*=\s*True", text), path
        assert path in pickles or not re.search(r"^\s*(import|from) pickle\b", text, re.M), path
        assert path.name == "worker.py" or not re.search(r"pickle\.(loads?|Unpickler)", text), path


# ---- sizes --------------------------------------------------------------------------------------


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """The whole syntax tree of a file."""
    return tuple(ast.walk(ast.parse(path.read_text())))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [x for x in nodes(path) if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef))]


def where(path: Path, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def test_files_are_short():
    """400 lines, what can be read in one go; train.py and the loop, which are tables of contents,
    much less."""
    limits = {TRAIN: 60, ROOT / "papo" / "train" / "loop.py": 150}
    too_long = {
        str(path.relative_to(ROOT)): lines
        for path in [*SOURCES, TRAIN, *TESTS, *NATIVE]
        if (lines := len(path.read_text().splitlines())) > limits.get(path, 400)
    }
    assert too_long == {}


def test_functions_are_short():
    long = [
        where(path, node)
        for path in [*SOURCES, TRAIN]
        for node in functions(path)
        if _code_lines(node) > 60
    ]
    assert long == []


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without its docstring, which for a public function is the manual."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_functions_have_at_most_ten_arguments():
    """Of the packages. A Triton kernel's are those of a launch, which knows no structs."""
    many = [
        where(path, node)
        for path in SOURCES
        if module_name(path).split(".")[0] != "benchmarks"
        for node in functions(path)
        if len(_arguments(node)) > 10
        and not any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    assert many == []


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_prose_is_at_most_120_columns_wide():
    """But for a row of a table, which cannot be broken."""
    folders = ("docs", "benchmarks", "experiments", "tests", "configs", ".github")
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*.yaml"), *ROOT.glob(".*.yaml"), ROOT / "Makefile"]
    for suffix in ("md", "yaml", "yml"):
        pages += [path for folder in folders for path in (ROOT / folder).rglob(f"*.{suffix}")]
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted(pages)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120 and not line.startswith("|")
    ]
    assert wide == []


# ---- tests --------------------------------------------------------------------------------------


def test_only_conftest_skips():
    """A test says what it needs; one file says what happens where that is missing."""
    skipping = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in TESTS
        if path != ROOT / "tests" / "conftest.py"
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and node.attr in ("skip", "skipif", "importorskip")
    ]
    assert skipping == []


def test_every_complaint_has_its_test():
    """Each test that COMPLAINTS.md names is there, once."""
    named = re.findall(r"`(test_\w+)`", (ROOT / "tests" / "COMPLAINTS.md").read_text())
    assert len(named) > 50
    defined = [node.name for path in TESTS for node in functions(path)]
    assert {name: n for name in named if (n := defined.count(name)) != 1} == {}


def test_names_of_tests_are_words():
    """No numbers of a list that a reader would have to look up."""
    numbered = re.compile(r"test_(complaint|requirement)s?_\d")
    assert [
        where(p, node) for p in TESTS for node in functions(p) if numbered.match(node.name)
    ] == []


@pytest.mark.needs("setuptools")
def test_every_data_file_is_shipped(monkeypatch):
    """What lies beside the code, py.typed of both packages among it, is in a wheel."""
    from setuptools import Distribution
    from setuptools.config.pyprojecttoml import apply_configuration

    monkeypatch.chdir(ROOT)
    distribution = apply_configuration(Distribution(), "pyproject.toml")
    distribution.include_package_data = False  # no manifest: what pyproject.toml lists, no more
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    shipped = {f"{source}/{name}" for _, source, _, names in command.data_files for name in names}
    beside = {
        str(path.relative_to(ROOT))
        for package in ("papo", "papo_kernels")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
    }
    assert {"papo/py.typed", "papo_kernels/py.typed"} < beside
    assert shipped == beside


# ---- the native sources -------------------------------------------------------------------------


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def test_native_code_is_free_of_torch_and_python():
    """Built once, it runs under every torch version; only bindings.cpp knows Python."""
    assert len(NATIVE) > 8
    for path in NATIVE:
        torch_headers = [h for h in includes(path) if re.match(r"(torch|ATen|c10|caffe2)/", h)]
        assert torch_headers == [], path
        assert path.name == "bindings.cpp" or not [
            h for h in includes(path) if re.match(r"pybind11/|Python\.h", h)
        ], path


def test_shared_headers_include_only_each_other_and_c():
    """They compile for host and device, and once per instruction set."""
    allowed = {"math.h", "stdint.h"}
    for path in (CSRC / "include" / "papo").glob("*.h"):
        foreign = [h for h in includes(path) if not h.startswith("papo/") and h not in allowed]
        assert foreign == [], path


def test_per_isa_code_uses_no_standard_library():
    """Its inline functions, compiled with AVX-512, could be linked into code that runs without.
    (type_traits and initializer_list hold no code.)"""
    seen, todo = set(), [CSRC / "cpu" / "row_kernels.cpp"]
    while todo:
        path = todo.pop()
        seen.add(path)
        for header in includes(path):
            local = [p for p in (path.parent / header, CSRC / "include" / header) if p.exists()]
            todo += [p for p in local if p not in seen]
            if not local:
                no_code = {"type_traits", "initializer_list"}
                assert header.endswith(".h") or header in no_code, f"{path.name}: <{header}>"
    assert {"row_kernels.cpp", "simd.h", "row_grad.h"} <= {path.name for path in seen}
    for path in seen:
        used = re.findall(r"std::\w+", path.read_text())
        code = [x for x in used if not re.fullmatch(r"std::(\w+_[tv]|initializer_list)", x)]
        assert code == [], path  # the rest are types and constants


def test_cmake_lists_every_source():
    listed = (ROOT / "CMakeLists.txt").read_text()
    sources = [p for p in NATIVE if p.suffix in (".cpp", ".cu")]
    missing = [str(p.relative_to(ROOT)) for p in sources if str(p.relative_to(ROOT)) not in listed]
    assert missing == []
    assert "-march=native" not in listed
