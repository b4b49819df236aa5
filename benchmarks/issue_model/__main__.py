"""Command line: counts and modelled times of one call."""

from __future__ import annotations

import argparse
from pathlib import Path

from .build import ROOT, Build
from .model import Call, Device, Modelled, model


def report(m: Modelled, depth: int) -> str:
    call, launch = m.call, m.launch
    lines = [
        f"{call.task} [{call.rows}, {call.columns}] {call.dtype} -> {call.out}",
        f"  {launch.symbol}",
        f"  {m.registers} registers, {m.clusters} clusters of {launch.cluster} blocks of"
        f" {launch.threads} threads, {launch.blocks_per_multiprocessor} blocks a multiprocessor",
        f"  ms: floor {m.floor_ms:.4f}, compute alone {m.compute_ms:.4f}, modelled"
        f" {m.model_ms:.4f}",
        f"  cycles a row: floor {m.floor_cycles:.0f}, compute alone {m.compute_cycles:.0f},"
        f" modelled {m.cycles:.0f}",
        f"  issue slots used, compute alone: {m.utilisation:.2f}; units: "
        + ", ".join(f"{u} {b:.2f}" for u, b in sorted(m.busy.items(), key=lambda x: -x[1])),
        "  instructions an element: "
        + ", ".join(f"{p} {n:.2f}" for p, n in m.per_element.items() if n),
        "  instructions a row by warp: " + " ".join(f"{n:.0f}" for n in m.per_warp),
        "  of these once a row: " + " ".join(f"{n:.0f}" for n in m.once_a_row),
    ]
    if depth:
        merged: dict[tuple[str, ...], float] = {}
        for path, count in m.tree.items():
            for d in range(1, min(depth, len(path)) + 1):
                merged[path[:d]] = merged.get(path[:d], 0.0) + count
        for path in sorted(merged, key=lambda p: [(-merged[p[: i + 1]], p[i]) for i in range(len(p))]):
            lines.append(f"  {merged[path]:9.0f} {'  ' * len(path)}{path[-1]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.issue_model", description=__doc__)
    parser.add_argument("calls", nargs="+", help="TASK:ROWSxCOLUMNS[:DTYPE[:OUT]], as"
                        " stats:8192x151936 or loss:4096x128256:fp32:bf16")  # fmt: skip
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to compile")
    parser.add_argument("--rows", type=int, default=6, help="rows to follow a cluster for")
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
