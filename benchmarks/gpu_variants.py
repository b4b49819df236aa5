"""Builds of the CUDA kernels beside each other: ``python -m benchmarks.gpu_variants NAME=FILE``.

FILE is a built extension (`_C*.so`), and there may be many. Each is loaded into a process of its
own, checked on small inputs against float64, and timed: a copy of the logits, the statistics, the
loss with its gradient in place, and the loss of float32 logits with a bfloat16 gradient.
``--tiles`` times the loss by every tile instead. The record is `gpu-variants-<gpu>-<date>.json` in
``--out``.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.build import hold_back_extension, load_extension

# The package must not load the extension that it has.
hold_back_extension()

import torch  # noqa: E402

from benchmarks.gpu_check import smoke, target, tiles  # noqa: E402
from benchmarks.gpu_check.files import Notes  # noqa: E402
from benchmarks.gpu_workload import Workload  # noqa: E402
from benchmarks.harness import ROOT, Case, environment, measure, save_json  # noqa: E402
from benchmarks.shapes import GPU_TIMED, Shape  # noqa: E402

ROUNDS, TILE_ROUNDS, BEST = 11, 3, 12
WATCHDOG = 60  # seconds of a variant, which takes two
CHECKED = ((150, 1000), (64, 151936), (5, 1023), (600, 4096))
# Besides those that gpu-check times: short rows, and rows that start off a 16-byte boundary.
TIMED = (*GPU_TIMED, Shape(65536, 4096, torch.bfloat16), Shape(8192, 151937, torch.bfloat16))
MOST_WIDE = 2 << 30  # bytes of float32 logits


def times(notes: Notes) -> None:
    """What is wrong with the kernels, and their milliseconds by shape."""
    backend, stopwatch = target.backend_of("resident"), target.stopwatch()
    for rows, vocab in CHECKED:
        for dtype in (torch.bfloat16, torch.float32):
            shape = Shape(rows, vocab, dtype)
            line = smoke.line_of(Workload(shape, target.device()), backend)
            if not line.startswith("ok"):
                notes.put(wrong={**notes.data.get("wrong", {}), shape.name: line})
    for shape in TIMED:
        work = Workload(shape, target.device())
        cases = [
            Case("copy", work.restore),
            Case("stats", lambda work=work: work.stats(backend)),
            Case("loss", lambda work=work: work.loss(backend), work.restore),
        ]
        if 4 * shape.rows * shape.vocab <= MOST_WIDE:
            wide = work.logits.float()
            cases.append(Case("narrow", lambda w=work, x=wide: w.loss_into(x, w.scratch, backend)))
        measure(cases, target.rounds(ROUNDS), stopwatch)
        notes.put(times={**notes.data.get("times", {}), shape.name: _figures(cases)})


def by_tile(notes: Notes) -> None:
    """The loss's milliseconds by the best tiles of each shape."""
    backend, stopwatch = target.backend_of("resident"), target.stopwatch()
    for shape in GPU_TIMED:
        work, found = Workload(shape, target.device()), {}
        for tile in tiles.loss_tiles(shape.vocab, shape.dtype.itemsize):
            with target.forced({"PAPO_KERNEL": "resident", "PAPO_TILE": tile}):
                case = Case("loss", lambda work=work: work.loss(backend), work.restore)
                measure([case], target.rounds(TILE_ROUNDS), stopwatch, warmup=1)
            if not case.failure:
                found[tile] = round(case.ms, 4)
        best = dict(sorted(found.items(), key=lambda pair: pair[1])[:BEST])
        notes.put(tiles={**notes.data.get("tiles", {}), shape.name: best})


def _figures(cases: list[Case]) -> dict[str, float | str]:
    return {case.name: case.failure or round(case.ms, 4) for case in cases}


def apart(work: Callable[[Notes], None], path: Path, notes: Notes) -> dict[str, Any]:
    """What `work` notes of an extension, in a forked child; how it ended, where it did not end
    well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            faulthandler.dump_traceback_later(WATCHDOG, exit=True)
            load_extension(path)
            work(notes)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {**Notes(notes.path).data, **({"exit": code} if code else {})}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_variants", description=__doc__)
    parser.add_argument("variants", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--tiles", action="store_true", help="the loss by tile")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-variants")
    args = parser.parse_args()
    pairs = [text.partition("=") for text in args.variants]
    for name, _, file in pairs:
        if not name or not Path(file).is_file():
            parser.error(f"NAME=FILE: expected a built extension's file, got {name}={file}")
    args.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, _, file in pairs:
        notes = Notes(args.out / f"{name}.json")
        notes.path.unlink(missing_ok=True)
        notes.data.clear()
        found[name] = apart(by_tile if args.tiles else times, Path(file), notes)
        print(name, found[name], flush=True)
    facts = environment()
    gpu = re.sub(r"[^a-z0-9]+", "-", facts.get("gpu", "none").lower().removeprefix("nvidia "))
    record = {"environment": facts, "variants": found}
    print(save_json(args.out / f"gpu-variants-{gpu}-{datetime.date.today()}.json", record))
    return int(any("exit" in entry or "wrong" in entry for entry in found.values()))


if __name__ == "__main__":
    sys.exit(main())
