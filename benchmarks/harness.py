"""Interleaved, cold-cache timing and the record that is written of it."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PEERS = ("triton", "transformers", "trl", "liger-kernel", "quack-kernels", "cut-cross-entropy")
PACKAGES = ("setuptools", *PEERS)
BUSY_CYCLES = 2_000_000  # of a GPU: about 1 ms


@dataclass
class Case:
    """Something to time: ``prepare`` is untimed and runs before every ``run``."""

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    times: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    failure: str = ""

    @property
    def ms(self) -> float:
        """Median of the measured rounds, in milliseconds."""
        return statistics.median(self.times)


class CacheFlusher:
    """Overwrites more memory than the caches hold, so that the next run starts cold."""

    def __init__(self, mebibytes: int = 96) -> None:
        self._buffer = torch.zeros(mebibytes * 2**20 // 4, dtype=torch.int32)

    def __call__(self) -> None:
        self._buffer.add_(1)


def time_interleaved(
    cases: Sequence[Case],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    warmup: int = 2,
) -> None:
    """Fills every case's ``times`` (ms): one run of each case per round, so that a slow minute of
    the machine touches all alike. ``clock`` is process CPU time unless wall time is wanted."""
    flush = CacheFlusher()
    gc.disable()
    try:
        for i in range(warmup + rounds):
            for case in cases:
                if case.prepare is not None:
                    case.prepare()
                flush()
                start = clock()
                case.run()
                elapsed = clock() - start
                if i >= warmup:
                    case.times.append(elapsed * 1e3)
    finally:
        gc.enable()


def time_on_gpu(cases: Sequence[Case], rounds: int, warmup: int = 3) -> list[Case]:
    """The same with CUDA events, the L2 cache overwritten before every run.

    The device is busy while the host launches a case, up to about a millisecond of the host's time,
    or a small case would be timed with the gaps between its launches. A case that makes the host
    wait still shows its gaps.

    A case that raises is left out of what is returned, its reason in ``failure``; the others are
    still measured.
    """
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8)
    flush = flush.cuda()
    alive = [case for case in cases if _survives(case, warmup)]
    for _ in range(rounds):
        for case in alive:
            if case.prepare is not None:
                case.prepare()
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            case.run()
            end.record()
            end.synchronize()
            case.times.append(start.elapsed_time(end))
    return alive


def _survives(case: Case, warmup: int) -> bool:
    """Warms a case up and notes its peak of memory beyond what it starts with."""
    try:
        for _ in range(warmup):
            if case.prepare is not None:
                case.prepare()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            case.run()
            torch.cuda.synchronize()
            case.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    except Exception as error:
        case.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        return False
    return True


class Produced(torch.autograd.Function):
    """`logits` as if a model had just made them from `anchor`, at no cost: a loss may overwrite
    what an operation returned, but not a leaf."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, dlogits: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dlogits.new_zeros(()), None


def produced(logits: torch.Tensor) -> torch.Tensor:
    """A non-leaf tensor over the storage of `logits` that requires grad."""
    anchor = torch.zeros((), dtype=logits.dtype, device=logits.device, requires_grad=True)
    result: torch.Tensor = Produced.apply(anchor, logits)
    return result


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, str]:
    """What a result depends on."""
    device = {}
    if torch.cuda.is_available():
        device = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return {
        **device,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_json(name: str, record: dict[str, Any], path: Path | None = None) -> Path:
    """Writes `path`, or ``results/<name>-<date>.json``, and returns it. What was there before is
    replaced at once: a reader, or who stops the writer, never finds half a file."""
    RESULTS.mkdir(exist_ok=True)
    path = path or RESULTS / f"{name}-{datetime.date.today().isoformat()}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    return part.replace(path)
