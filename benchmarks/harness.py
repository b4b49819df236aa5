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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("triton", "transformers", "trl", "liger-kernel", "quack-kernels", "cut-cross-entropy")
PACKAGES = ("setuptools", *PEERS)
BUSY_CYCLES = 2_000_000  # of a GPU: about 1 ms


@dataclass
class Case:
    """Something to time: ``prepare`` is untimed and runs before every ``run``; ``check`` raises if
    what ``run`` returned is wrong, and the case is then not timed."""

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    check: Callable[[Any], None] | None = None
    times: list[float] = field(default_factory=list)
    mhz: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    failure: str = ""

    @property
    def ms(self) -> float:
        """Median of the measured rounds, in milliseconds."""
        return statistics.median(self.times)

    @property
    def spread(self) -> dict[str, float]:
        """Median and quartiles of the measured rounds, in milliseconds."""
        few = len(self.times) < 2
        q1, _, q3 = self.times * 3 if few else statistics.quantiles(self.times, method="inclusive")
        return {"ms": self.ms, "q1": q1, "q3": q3}


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


class GpuStopwatch:
    """Times a call with CUDA events, from cold caches, and the clock the multiprocessors ran at.

    The device is busy while the host launches a case, up to about a millisecond of the host's time,
    or a small case would be timed with the gaps between its launches. A case that makes the host
    wait still shows its gaps.
    """

    def __init__(self) -> None:
        count = 2 * torch.cuda.get_device_properties(0).L2_cache_size // 4
        self._written = torch.zeros(count, device="cuda")
        self._read = torch.zeros(count, device="cuda")

    def __call__(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds and MHz."""
        self._written.zero_()
        self._read.sum()  # or the lines just written would be written back while the case runs
        idle, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        idle.record()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), BUSY_CYCLES / idle.elapsed_time(start) / 1e3


class HostStopwatch:
    """Times a call on the host by the wall clock; for rehearsals, from warm caches."""

    def __call__(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds, and 0 for a clock that is not known."""
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3, 0.0


Stopwatch = Callable[[Callable[[], Any]], tuple[float, float]]


def measure(
    cases: Sequence[Case], rounds: int, stopwatch: Stopwatch, warmup: int = 3
) -> list[Case]:
    """Fills every case's ``times`` (ms) and ``mhz``: one run of each case per round, after
    ``warmup`` runs that also compile.

    A case that raises is left out of what is returned, its reason in ``failure``; the others are
    still measured.
    """
    alive = [case for case in cases if _survives(case, warmup)]
    for _ in range(rounds):
        for case in alive:
            if case.prepare is not None:
                case.prepare()
            ms, mhz = stopwatch(case.run)
            case.times.append(ms)
            case.mhz.append(mhz)
    return alive


def _survives(case: Case, warmup: int) -> bool:
    """Warms a case up and notes its peak of memory beyond what it starts with."""
    on_gpu = torch.cuda.is_available()
    result = None
    try:
        for _ in range(warmup):
            result = None  # of the run before, which is no part of this one's peak
            if case.prepare is not None:
                case.prepare()
            if on_gpu:
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            result = case.run()
            if on_gpu:
                torch.cuda.synchronize()
                case.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        if case.check is not None:
            case.check(result)
    except Exception as error:
        case.failure = one_line(error)
        return False
    return True


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its text."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


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
    return {**device, **host_environment()}


def host_environment() -> dict[str, str]:
    """The same without the device, which is left untouched."""
    return {
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


def write_json(name: str, record: dict[str, Any]) -> Path:
    """Writes ``results/<name>-<date>.json`` and returns it."""
    RESULTS.mkdir(exist_ok=True)
    return save_json(RESULTS / f"{name}-{datetime.date.today().isoformat()}.json", record)


def save_json(path: Path, record: dict[str, Any]) -> Path:
    """Writes `path`. What was there before is replaced at once: a reader, or who stops the writer,
    never finds half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    return part.replace(path)
