"""The house rules that a reader of the code relies on: which way imports point, who may do what.

An AST walk, so that an import inside a function counts like any other.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(
    path
    for folder in ("papo_kernels", "papo", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
TRAIN = ROOT / "train.py"


class Import(NamedTuple):
    module: str  # absolute
    line: int
    top_level: bool  # runs when the file is imported, and not under TYPE_CHECKING


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _absolute(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _imported(node: ast.AST, path: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = _absolute(node, path)
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
    return []


def imports(path: Path) -> list[Import]:
    """Every import of a file, wherever it stands."""
    tree = ast.parse(path.read_text())
    found: list[Import] = []

    def walk(node: ast.AST, top_level: bool) -> None:
        found.extend(
            Import(name, getattr(node, "lineno", 0), top_level) for name in _imported(node, path)
        )
        inner = top_level and not isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        )
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inner = False
        for child in ast.iter_child_nodes(node):
            walk(child, inner)

    walk(tree, True)
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offences(paths: list[Path], *packages: str, top_level_only: bool = False) -> list[str]:
    """The imports of any of `packages` in `paths`, as file:line."""
    return [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for path in paths
        for found in imports(path)
        if any(inside(found.module, package) for package in packages)
        and (found.top_level or not top_level_only)
    ]


def package_files(name: str) -> list[Path]:
    return [path for path in SOURCES if inside(module_name(path), name)]


# ---- the walk itself ----------------------------------------------------------------------------


def test_the_walk_sees_every_kind_of_import(tmp_path, monkeypatch):
    """A rule that cannot fail is none."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "papo" / "rollout" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b\nfrom . import c\nfrom ..d import e\n"
        "def f():\n    import g\nif TYPE_CHECKING:\n    import h\nimportlib.import_module('i')\n"
    )
    names = {found.module: found.top_level for found in imports(path)}
    expected = {"a.b", "papo.rollout", "papo.rollout.c", "papo.d", "papo.d.e", "g", "h", "i"}
    assert set(names) == expected
    assert [name for name, top in names.items() if not top] == ["g", "h"]
    monkeypatch.setitem(globals(), "SOURCES", [path])
    assert offences([path], "a") == ["papo/rollout/x.py:1 imports a.b"]
    assert offences([path], "g", top_level_only=True) == []


def test_there_is_something_to_walk():
    names = {module_name(path) for path in SOURCES}
    assert {"papo_kernels.api", "papo_kernels.reference", "papo.config", "papo.train.loop"} <= names


# ---- which way imports point --------------------------------------------------------------------


def test_kernels_import_nothing_of_the_trainer():
    assert offences(package_files("papo_kernels"), "papo", "train", "tests", "benchmarks") == []


def test_the_trainer_imports_nothing_that_stands_above_it():
    assert offences(package_files("papo"), "train", "tests", "benchmarks") == []


def test_nothing_imports_the_tests():
    assert offences([*SOURCES, TRAIN], "tests") == []


def test_kernels_need_torch_only():
    """At import time: neither the trainer's libraries nor triton."""
    packages = ("deepspeed", "transformers", "pydantic", "yaml", "numpy", "triton")
    outside_triton = [p for p in package_files("papo_kernels") if "triton" not in p.parts]
    assert offences(outside_triton, *packages, top_level_only=True) == []
    assert offences(package_files("papo_kernels"), *packages[:-1]) == []


def test_the_reference_imports_no_backend():
    above = ("api", "ops", "head", "backends", "_C")
    path = ROOT / "papo_kernels" / "reference.py"
    assert offences([path], *(f"papo_kernels.{name}" for name in above)) == []


def test_backends_do_not_import_each_other():
    names = ("reference", "backends.cpu", "backends.cuda", "backends.triton")
    for name in names:
        others = [f"papo_kernels.{other}" for other in names if other != name]
        assert offences(package_files(f"papo_kernels.{name}"), *others) == []


def test_only_one_file_loads_the_extension():
    others = [p for p in SOURCES if p != ROOT / "papo_kernels" / "backends" / "extension.py"]
    assert offences(others, "papo_kernels._C") == []


def test_deepspeed_and_collectives_stay_in_two_files():
    """Of the trainer. Of the kernels, only what merges a split vocabulary talks to other ranks."""
    allowed = {ROOT / "papo" / "dist" / name for name in ("engine.py", "collectives.py")}
    rest = [path for path in package_files("papo") if path not in allowed]
    assert offences([*rest, TRAIN], "deepspeed", "torch.distributed") == []
    allowed = {ROOT / "papo_kernels" / "head" / "shards.py"}
    rest = [path for path in package_files("papo_kernels") if path not in allowed]
    assert offences(rest, "torch.distributed") == []
    users = [p for p in SOURCES if p not in allowed and "papo_kernels" in p.parts]
    uses = [p.name for p in users if re.search(r"\b(torch\.)?dist(ributed)?\.\w", p.read_text())]
    assert uses == []


def test_stages_do_not_know_each_other():
    """What computes knows the border types and its own options, not its neighbours; what puts
    stages together (experience, stats, step, and loop their order) knows them."""
    policy = ("advantage", "batch", "objective", "phase", "weighting")
    stages = ("data.problems", "reward.pool", *(f"policy.{name}" for name in policy))
    for name in stages:
        others = [f"papo.{other}" for other in (*stages, "train", "cli") if other != name]
        assert offences(package_files(f"papo.{name}"), *others) == []


# ---- who may do what ----------------------------------------------------------------------------


def test_only_ops_register_with_torch():
    registering = re.compile(r"custom_op\(|torch\.library\.|from torch\.library|TORCH_LIBRARY")
    found = {
        str(path.relative_to(ROOT)) for path in SOURCES if registering.search(path.read_text())
    }
    assert found
    assert all(re.fullmatch(r"papo_kernels/ops/\w+\.py", name) for name in found), found


def test_trust_remote_code_and_pickle():
    """Nothing is unpickled from files, nothing runs a downloaded model's code unasked."""
    for path in [*SOURCES, TRAIN]:
        text = path.read_text()
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path}: {call}"
        assert not re.search(r"trust_remote_code\s*=\s*True", text), path
        assert not re.search(r"^\s*(import|from) pickle\b", text, re.M), path


def test_file_sizes():
    """The caps of the house: 400 lines a file, 60 a function; train.py and the loop much less."""
    limits = {TRAIN: 60, ROOT / "papo" / "train" / "loop.py": 150}
    code = [*SOURCES, TRAIN, *CSRC.rglob("*.cpp"), *CSRC.rglob("*.h"), *CSRC.rglob("*.cu*")]
    too_long = {
        str(path.relative_to(ROOT)): lines
        for path in code
        if (lines := len(path.read_text().splitlines())) > limits.get(path, 400)
    }
    assert too_long == {}
    long_functions = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in [*SOURCES, TRAIN]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and _code_lines(node) > 60
    }
    assert long_functions == set()


def _code_lines(node: ast.FunctionDef) -> int:
    """Without its docstring, which for a public function is the manual."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


# ---- the native sources -------------------------------------------------------------------------


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


NATIVE = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))


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


# ---- importing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("papo.config", ("deepspeed", "transformers", "triton")),
        ("papo_kernels.types", ("triton", "deepspeed", "transformers")),
        ("papo_kernels", ("triton", "deepspeed", "transformers")),
    ],
)
def test_imports_without_a_gpu(module, unwanted):
    """In a process of its own, with no GPU visible and the heavy libraries not installed."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in unwanted)
    code = f"import sys\n{blocked}import {module}\nimport torch\n"
    code += "assert not torch.cuda.is_initialized()\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
