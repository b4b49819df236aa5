"""Command line: the counts beside those that are committed, and the rules that are broken."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version

from benchmarks.issue_model.build import ROOT, nvcc

from . import cuda_kernels, triton_kernels

RECORD = ROOT / "benchmarks/results/machine-code.json"
AMD_CALLS = ("stats", "stats_odd", "backward", "loss", "loss_split", "scale")
Counts = dict[str, dict[str, float]]


def cuda() -> tuple[Counts, list[str]]:
    """Counts by kernel, and broken rules."""
    kernels = sorted(cuda_kernels.compiled(), key=str)
    broken = [rule for kernel in kernels for rule in cuda_kernels.broken_rules(kernel)]
    return {f"cuda {kernel}": cuda_kernels.counts(kernel) for kernel in kernels}, broken


def triton() -> tuple[Counts, list[str]]:
    """Counts by call, and broken rules."""
    counts: Counts = {}
    broken: list[str] = []
    for name in triton_kernels.CALLS:
        for architecture in triton_kernels.ARCHITECTURES:
            found = triton_kernels.counts(name, architecture)
            counts[f"triton {name} sm_{architecture}"] = found
            broken += triton_kernels.broken_rules(name, architecture)
    for name in AMD_CALLS:
        broken += triton_kernels.broken_amd_rules(name)
    return counts, broken


def versions() -> dict[str, str]:
    """Of the compilers: counts of others are not comparable."""
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True)
    return {"nvcc": text.stdout.split("release ")[1].split(",")[0], "triton": version("triton")}


def compared(counts: Counts, record: Counts) -> Iterator[tuple[str, bool]]:
    """A line for every count, and whether it is worse than in the record."""
    for kernel, found in counts.items():
        for name, count in found.items():
            before = record.get(kernel, {}).get(name)
            worse = before is not None and count > before
            change = "new" if before is None else "" if count == before else f"was {before:g}"
            yield f"{kernel:40} {name:24} {count:8.4g} {change}{' WORSE' if worse else ''}", worse


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code")
    parser.add_argument("--save", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    options = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    (counts, broken), (others, others_broken) = cuda(), triton()
    counts, broken = counts | others, broken + others_broken
    used = versions()
    if record and record["versions"] != used:
        print(f"The record is of {record['versions']}, these counts are of {used}.")
    lines = list(compared(counts, record.get("counts", {})))
    print("\n".join(line for line, _ in lines))
    print("\n".join(broken) or "No rule is broken.")
    if options.save:
        RECORD.write_text(json.dumps({"versions": used, "counts": counts}, indent=1) + "\n")
    return 1 if broken or any(worse for _, worse in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
