"""Deletes the synchronization of the CUDA kernels call by call, and shows that a test notices.

    python -m tests.mutate_cuda [WORDS OF A MUTANT ...]

Every call in csrc/cuda that orders something (a fence, an arrival, a wait, a synchronization, a
copy, a message) is left out in turn, or replaced by a weaker one; the result runs
`test_every_access_is_ordered` on the emulated machine. Prints what killed each mutant. The exit
status is 1 if one survived that REDUNDANT does not explain.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from tests.kernels import cuda_emulator
from tests.kernels.cuda_emulator import FLAGS, ROOT, SOURCES

TEST = "tests/kernels/test_cuda_fences.py"
DEADLINE_S = 120.0
# What may go, and what takes its place. `void()` is a statement, and what a void function returns.
CALLS: dict[str, tuple[str, ...]] = {
    "barrier_init": ("void()",),
    "barrier_init_fence": ("void()",),
    "barrier_arrive": ("void()",),
    "barrier_arrive_expect": ("void()", "machine::barrier_arrive({first})"),
    "barrier_wait": ("void()",),
    "barrier_wait_cluster": ("void()", "machine::barrier_wait({all})"),
    "fence_before_bulk": ("void()",),
    "bulk_load": ("void()",),
    "warp_sync": ("void()",),
    "block_sync": ("void()",),
    "cluster_sync": ("void()",),
    "send": ("void()",),
}
# The kernels' own functions that do nothing else: each of their calls is left out too.
FUNCTIONS = ("expect_messages", "release", "wait_for_former_plan")
# Calls that no kernel needs by the memory model of PTX: (file, their line, the line after), and why
# they are there.
REDUNDANT: dict[tuple[str, str, str], str] = {
    (
        "resident.cu",
        'machine::barrier_wait(full(at.buffer), at.parity, "full");',
        "const Span stage = stage_of(s);",
    ): "the plan comes after the sums, whose warps have waited for the same bytes; so a reader of "
    "a buffer has waited for its copy itself, and not by way of a message of another block",
}


class Mutant(NamedTuple):
    path: str  # from the root
    line: int
    text: str  # of that line
    after: str  # the next one
    by: str
    source: str  # all of the file

    @property
    def name(self) -> str:
        by = "" if self.by == "void()" else f" -> {self.by}"
        return f"{Path(self.path).name}:{self.line} {self.text}{by}"


def arguments(source: str, begin: int) -> tuple[list[str], int]:
    """The arguments of a call whose parenthesis opens before `begin`, and where it ends."""
    found, depth, at, last = [], 1, begin, begin
    while depth > 0:
        depth += {"(": 1, ")": -1}.get(source[at], 0)
        if depth == 0 or (depth == 1 and source[at] == ","):
            found.append(source[last:at].strip())
            last = at + 1
        at += 1
    return found, at


def mutants() -> Iterator[Mutant]:
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu*")):
        if path.name == "machine.cuh":
            continue
        source = path.read_text()
        own = rf"(?<!void )\b({'|'.join(FUNCTIONS)})\("
        for call in re.finditer(rf"machine::({'|'.join(CALLS)})\(|{own}", source):
            given, end = arguments(source, call.end())
            line = source.count("\n", 0, call.start()) + 1
            text, after = (x.strip() for x in source.splitlines()[line - 1 : line + 1])
            for form in CALLS[call[1]] if call[1] else ("void()",):
                by = form.format(first=given[0], all=", ".join(given))
                changed = source[: call.start()] + by + source[end:]
                yield Mutant(str(path.relative_to(ROOT)), line, text, after, by, changed)


class Builder:
    """Builds the emulated library with one file changed; what does not include it is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("csrc", "tests/cpp"):
            shutil.copytree(ROOT / part, folder / part)
        self.sources = [f"csrc/cuda/{stem}.cu" for stem in SOURCES]
        self.sources.append("tests/cpp/emulated_cuda.cpp")
        self.needs = {}
        for source in self.sources:
            made = self._compiler("-MM", source).stdout
            self.needs[source] = {source, *re.findall(r"csrc/cuda/\S+", made)}
            self._compiler("-c", source, "-o", self._object("whole", source))

    def _object(self, kind: str, source: str) -> str:
        return str(self.folder / f"{kind}_{Path(source).stem}.o")

    def _compiler(self, *args: str) -> subprocess.CompletedProcess[str]:
        # A mutant may leave names unused, and is run less often than compiled.
        flags = [f for f in FLAGS if f not in ("-Wall", "-Wextra", "-Werror", "-O1")]
        command = ["g++", *flags, "-O0", "-w", "-x", "c++", *args]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return done

    def build(self, path: str, source: str) -> Path:
        """The library in which the file at `path` has this text."""
        kept = (self.folder / path).read_text()
        (self.folder / path).write_text(source)
        objects = []
        for unit in self.sources:
            kind = "changed" if path in self.needs[unit] else "whole"
            if kind == "changed":
                self._compiler("-c", unit, "-o", self._object(kind, unit))
            objects.append(self._object(kind, unit))
        (self.folder / path).write_text(kept)
        library = self.folder / "mutant.so"
        subprocess.run(["g++", "-shared", *objects, "-o", library], check=True)
        return library


class Verdict:
    """A pytest plugin that keeps the first failure."""

    def __init__(self) -> None:
        self.said = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.said:
            crash = report.longrepr.reprcrash.message.splitlines()[0]
            self.said = f"{report.nodeid.split('[')[-1].rstrip(']')}: {crash}"


def run_tests(library: Path, to) -> None:
    verdict = Verdict()
    options = ["-x", "-p", "no:cacheprovider", "-k", "ordered"]
    with (
        mock.patch.object(cuda_emulator, "_built", lambda: library),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        status = pytest.main([*options, TEST], plugins=[verdict])
    to.put(verdict.said or ("" if status == 0 else f"pytest: {status}"))


def killed_by(library: Path) -> str:
    """What a test says to the library; "" if nothing."""
    context = multiprocessing.get_context("fork")
    to = context.Queue()
    process = context.Process(target=run_tests, args=(library, to))
    process.start()
    process.join(DEADLINE_S)
    if process.is_alive():
        process.kill()
        process.join()
        return f"no end within {DEADLINE_S:.0f} s"
    return to.get() if process.exitcode == 0 else f"exit status {process.exitcode}"


def main(words: list[str]) -> int:
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(Path(folder))
        unchanged = "csrc/cuda/resident.cu"
        whole = killed_by(builder.build(unchanged, (ROOT / unchanged).read_text()))
        if whole:
            print(f"The kernels as they are fail: {whole}")
            return 1
        for mutant in mutants():
            if not all(word in mutant.name for word in words):
                continue
            said = killed_by(builder.build(mutant.path, mutant.source))
            reason = REDUNDANT.get((Path(mutant.path).name, mutant.text, mutant.after))
            if not said:
                survivors += reason is None
                said = "SURVIVED" if reason is None else f"redundant: {reason}"
            print(f"{mutant.name}\n    {said}", flush=True)
    print(f"{survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
