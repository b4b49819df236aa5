"""Nsight Compute on one launch of one kernel: its counters as CSV among the logs, and the bytes it
moved beside the bytes it had to move.

`counted.py` is the program that ncu starts.
"""

from __future__ import annotations

import csv
import io
import subprocess
from typing import Any

from benchmarks.gpu_check import counted, target
from benchmarks.gpu_check.facts import beside_nvcc
from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_check.runner import worker_command
from benchmarks.gpu_check.worker import work_folder
from benchmarks.harness import ROOT

SECTIONS = (
    "SpeedOfLight",
    "SchedulerStats",
    "WarpStateStats",
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
    "SourceCounters",
    "Occupancy",
)
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
DURATION = "gpu__time_duration.sum"
# As CSV: every metric; samples and counts by machine instruction.
PAGES = {
    "raw": ("--page", "raw", "--print-units", "base"),
    "source": ("--page", "source", "--print-source", "sass"),
}


def command(tool: str, case: str, report: str) -> list[str]:
    """ncu on the launches between a case's start and stop of the profiler. The clocks are left as
    they are."""
    options = ["--clock-control", "none", "--target-processes", "all", "--profile-from-start"]
    options += ["off", "--launch-count", "4", "--force-overwrite", "--export", report]
    for section in SECTIONS:
        options += ["--section", section]
    options += ["--metrics", ",".join((READ, WRITTEN, DURATION))]
    return [tool, *options, *worker_command(("counted", case))]


def parsed(text: str) -> list[dict[str, str]]:
    """The launches of a raw page, by metric; the row of units is left out."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    return list(csv.DictReader(io.StringIO("\n".join(lines))))[1:]


def trimmed(text: str) -> str:
    """A page without the columns that are empty or 0 in all rows: most of a long kernel's page."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = [row for row in csv.reader(lines) if len(row) > 2]
    if not rows or len({len(row) for row in rows}) > 1:
        return text
    kept = [i for i, column in enumerate(zip(*rows[1:], strict=True)) if set(column) - {"", "0"}]
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([[row[i] for i in kept] for row in rows])
    return out.getvalue()


def summary(launches: list[dict[str, str]], case: str) -> dict[str, Any]:
    """Of the longest launch: bytes of memory read and written beside the model's, and the rate."""

    def number(launch: dict[str, str], metric: str) -> float:
        return float(launch.get(metric, "0").replace(",", "") or 0)

    longest = max(launches, key=lambda launch: number(launch, DURATION))
    model_read, model_written = counted.model_bytes(case)
    read, written = number(longest, READ), number(longest, WRITTEN)
    nanoseconds = number(longest, DURATION)
    return {
        "kernel": longest.get("Kernel Name", "")[:120],
        "launches": len(launches),
        "MB read": read / 1e6,
        "MB read by the model": model_read / 1e6,
        "MB written": written / 1e6,
        "MB written by the model": model_written / 1e6,
        "GB/s": (read + written) / nanoseconds if nanoseconds else 0.0,
        "ms": nanoseconds / 1e6,
    }


def run(notes: Notes, case: str) -> int:
    tool = beside_nvcc("ncu")
    if tool is None:
        notes.put(skipped="ncu is neither on PATH nor beside nvcc")
        return 0
    work = work_folder()
    report = str(work / f"{case}.ncu-rep")
    variables = dict(target.FAMILIES[counted.CASES[case].family].variables)
    code = subprocess.run(
        ["env", *(f"{k}={v}" for k, v in variables.items()), *command(tool, case, report)], cwd=ROOT
    ).returncode
    notes.put(exit=code)
    for page, options in PAGES.items():
        done = subprocess.run(
            [tool, "--import", report, "--csv", *options], capture_output=True, text=True, cwd=ROOT
        )
        (work / "logs" / f"ncu-{case}-{page}.csv").write_text(trimmed(done.stdout))
        if done.returncode:
            notes.put(**{page: (done.stdout + done.stderr)[-300:]})
        elif page == "raw" and (launches := parsed(done.stdout)):
            notes.put(summary=summary(launches, case))
            print(case, notes.data["summary"])
    return 0 if "summary" in notes.data else 1
