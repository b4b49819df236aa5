"""Which way imports point, and who may import what.

An AST walk: an import inside a function or under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("papo_kernels", "papo", "benchmarks", "experiments")
    for path in (ROOT / folder).rglob("*.py")
)
TRAIN = ROOT / "train.py"
# What a package is made of, each part a folder or a file: it may import itself and what stands
# before it. The package's __init__ is its front door and may import all of it.
ORDER = {
    "papo_kernels": (
        *("checks", "aggregation", "objective", "types", "dispatch", "token_loss", "inputs"),
        *("reference", "backends", "head", "ops", "api"),
    ),
    "papo": (
        *("errors", "inputs", "outputs", "numbers", "types", "hub", "config", "reward", "data"),
        *("model", "preflight", "rollout", "policy", "dist", "record", "train", "cli"),
    ),
}


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


@functools.cache
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


def part_of(module: str) -> str:
    """The folder or file of a package that `module` belongs to; "" for the package itself."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("package", ORDER)
def test_every_part_has_its_place(package):
    parts = {part_of(module_name(path)) for path in package_files(package)} - {""}
    assert parts == set(ORDER[package])


@pytest.mark.parametrize("package", ORDER)
def test_parts_import_only_what_stands_before_them(package):
    order = ORDER[package]
    upward = []
    for path in package_files(package):
        part = part_of(module_name(path))
        above = order[order.index(part) + 1 :] if part else ()
        upward += offences([path], *(f"{package}.{name}" for name in above))
    assert upward == []


def imported_files(path: Path, modules: set[str]) -> set[str]:
    """Those of `modules` whose code an import of `path` runs: of ``from a import b``, a.b where it
    is a module, else a."""
    by_line: dict[int, set[str]] = {}
    for found in imports(path):
        by_line.setdefault(found.line, set()).add(found.module)
    named = set()
    for names in by_line.values():
        for name in names & modules:
            of_it = {other for other in names if other.startswith(name + ".")}
            if not of_it or of_it - modules:
                named.add(name)
    return named - {module_name(path)}


def a_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one cycle, [] if there is none."""
    done: set[str] = set()

    def visit(name: str, above: list[str]) -> list[str]:
        if name in above:
            return above[above.index(name) :]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*above, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_import_is_circular():
    files = [*package_files("papo"), *package_files("papo_kernels")]
    modules = {module_name(path) for path in files}
    graph = {module_name(path): imported_files(path, modules) for path in files}
    assert a_cycle(graph) == []


def test_a_cycle_is_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b", "c"}}
    assert a_cycle(graph) == ["b", "d"]
    assert a_cycle({**graph, "d": {"c"}}) == []


def test_packages_import_only_what_stands_below_them():
    """train.py, the benchmarks and the experiments → papo → papo_kernels; nothing imports the tests
    or the experiments, which have the benchmarks' record of a machine and no more of them."""
    kernels, trainer = package_files("papo_kernels"), package_files("papo")
    assert offences(kernels, "papo", "train", "tests", "benchmarks") == []
    assert offences(trainer, "train", "tests", "benchmarks") == []
    assert offences([*SOURCES, TRAIN], "tests") == []
    experiments = package_files("experiments")
    outside = [path for path in SOURCES if path not in experiments]
    assert offences([*outside, TRAIN], "experiments") == []
    theirs = {found.module for path in experiments for found in imports(path)}
    taken = {name for name in theirs if inside(name, "benchmarks")} - {"benchmarks"}
    assert all(inside(name, "benchmarks.harness") for name in taken), taken


def test_stages_do_not_know_each_other():
    """What samples, what rewards and what weighs know the border types and their own options; what
    puts them together is in train/."""
    stages = ("rollout", "reward", "policy")
    for name in stages:
        others = [f"papo.{other}" for other in (*stages, "data") if other != name]
        assert offences(package_files(f"papo.{name}"), *others) == []


def test_backends_do_not_import_each_other():
    """Nor what chooses among them, which imports them all."""
    modules = {module_name(path) for path in package_files("papo_kernels.backends")}
    choice = ROOT / "papo_kernels" / "backends" / "choice.py"
    backends = imported_files(choice, modules) - {"papo_kernels.backends.protocol"}
    assert len(backends) > 2
    for name in backends:
        others = [*(backends - {name}), "papo_kernels.backends.choice"]
        assert offences(package_files(name), *others) == []


# ---- who may import what ------------------------------------------------------------------------


def test_kernels_need_torch_only():
    """At import time: neither the trainer's libraries nor triton."""
    packages = ("deepspeed", "transformers", "pydantic", "yaml", "numpy", "triton")
    outside_triton = [p for p in package_files("papo_kernels") if "triton" not in p.parts]
    assert offences(outside_triton, *packages, top_level_only=True) == []
    assert offences(package_files("papo_kernels"), *packages[:-1]) == []


def test_one_file_loads_the_extension():
    loading = {path for path in SOURCES if offences([path], "papo_kernels._C")}
    assert len(loading) == 1


def test_one_folder_of_each_package_talks_to_other_ranks():
    """dist/ of the trainer; of the kernels head/, which merges a split vocabulary."""
    for package, folder in (("papo", "dist"), ("papo_kernels", "head")):
        elsewhere = [p for p in package_files(package) if part_of(module_name(p)) != folder]
        assert offences(elsewhere, "torch.distributed") == []
        using = re.compile(r"\b(torch\.)?dist(ributed)?\.(?!engine|collectives)[a-z_]+\(")
        assert [str(p) for p in elsewhere if using.search(p.read_text())] == []
    outside_dist = [p for p in SOURCES if not inside(module_name(p), "papo.dist")]
    assert offences([*outside_dist, TRAIN], "deepspeed") == []


# ---- importing ----------------------------------------------------------------------------------


def test_importing_needs_no_gpu_and_none_of_the_large_libraries():
    """In a process of its own."""
    blocked = {name: None for name in ("deepspeed", "transformers", "triton")}
    code = f"""
import sys
sys.modules.update({blocked})
import papo.config, papo_kernels, torch
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
