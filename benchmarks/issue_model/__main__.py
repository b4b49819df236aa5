"""Command line: counts and modeled times of one call."""

from __future__ import annotations

import argparse
from pathlib import Path

from .build import ROOT, Build
from .model import Call, Device, Modeled, model


def by_function(m: Modeled, depth: int) -> list[str]:
    """Instructions a row of the whole block by function, callees indented below callers."""
    totals: dict[tuple[str, ...], float] = {}
    for path, count in m.tree.items():
        for d in range(1, min(depth, len(path)) + 1):
            totals[path[:d]] = totals.get(path[:d], 0.0) + count

    def by_size(path: tuple[str, ...]) -> list[tuple[float, str]]:
        return [(-totals[path[: i + 1]], path[i]) for i in range(len(path))]

    return [f"  {totals[p]:9.0f} {'  ' * len(p)}{p[-1]}" for p in sorted(totals, key=by_size)]


def report(m: Modeled, depth: int) -> str:
    """A call's counts and times as text."""
    call, launch, pace = m.call, m.launch, m.compute
    units = sorted(pace.units.items(), key=lambda x: -x[1])
    lines = [
        f"{call.task} [{call.rows}, {call.columns}] {call.dtype} -> {call.out}: {launch.symbol}",
        f"  {m.registers} registers, {m.clusters} clusters of {launch.cluster} blocks of"
        f" {launch.threads} threads, {launch.blocks_per_multiprocessor} blocks a multiprocessor",
        "  ms: " + ", ".join(f"{name} {t:.4f}" for name, t in m.ms.items()),
        "  cycles a row: " + ", ".join(f"{name} {c:.0f}" for name, c in m.cycles.items()),
        f"  used, compute alone: issue {pace.issue:.2f}, "
        + ", ".join(f"{unit} {share:.2f}" for unit, share in units),
        "  instructions an element: "
        + ", ".join(f"{p} {n:.2f}" for p, n in m.per_element.items() if n),
        "  instructions a row by warp: " + " ".join(f"{n:.0f}" for n in m.per_warp),
        "  of these once a row: " + " ".join(f"{n:.0f}" for n in m.once_a_row),
    ]
    return "\n".join(lines + (by_function(m, depth) if depth else []))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.issue_model", description=__doc__)
    parser.add_argument("calls", nargs="+", help="TASK:ROWSxCOLUMNS[:DTYPE[:OUT]], as"
                        " stats:8192x151936 or loss:4096x128256:fp32:bf16")  # fmt: skip
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to compile")
    parser.add_argument("--rows", type=int, default=16, help="rows to follow a cluster for")
    parser.add_argument("--tree", type=int, default=0, help="depth of the table by function")
    options = parser.parse_args()
    build = Build(options.root)
    for text in options.calls:
        task, shape, *types = text.split(":")
        rows, columns = map(int, shape.split("x"))
        print(report(model(build, Call(task, rows, columns, *types), Device(), options.rows),
                     options.tree), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
