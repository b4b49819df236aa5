"""``python -m benchmarks.gpu_check``: everything that needs a GPU; benchmarks/README.md says how
it is used.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.build import hold_back_extension

# The package loads its extension when it is imported. Stages are forks of this process, and load
# what the first of them has built.
hold_back_extension()

from benchmarks.gpu_check import facts, rehearsal, stages, table, winners  # noqa: E402
from benchmarks.gpu_check.files import read  # noqa: E402
from benchmarks.gpu_check.runner import (  # noqa: E402
    Runner,
    clear,
    heed_signals,
    read_record,
)
from benchmarks.harness import ROOT  # noqa: E402

WORK = ROOT / "build" / "gpu-check"
RESULTS = "benchmarks/results"
# What a user may have set, and a stage sets for itself where it wants it.
CHOICES = (
    "PAPO_BACKEND",
    "PAPO_KERNEL",
    "PAPO_TILE",
    "PAPO_STATS_TILE",
    "PAPO_TRITON_CONFIG",
    "TRITON_INTERPRET",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--call", type=int, choices=(1, 2, 3), help="one of the three; all in turn")
    parser.add_argument(
        "--stages", type=names_of, default=(), help="of all calls, only these: build,sweep"
    )
    parser.add_argument("--out", type=Path, help="for what is written, at most 8 files")
    parser.add_argument("--wheels", type=Path, help="a folder of the peers' wheels")
    parser.add_argument("--rehearse", action="store_true", help="every stage, without a GPU")
    args = parser.parse_args()
    if args.stages:
        try:
            stages.only(stages.of_call(args.call or 0, "", WORK, None, {}), args.stages)
        except ValueError as error:
            parser.error(str(error))
    if args.wheels and not args.wheels.is_dir():
        parser.error(f"--wheels: {args.wheels} is not a folder")
    if args.out:
        # The nearest part of the path that is there: folders are made behind it.
        there = next(path for path in (args.out, *args.out.absolute().parents) if path.exists())
        if not there.is_dir():
            parser.error(f"--out: {there} is not a folder")
    return args


def names_of(text: str) -> tuple[str, ...]:
    """Stages, or kinds of them, separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def main() -> int:
    args = arguments()
    heed_signals()
    for name in CHOICES:
        os.environ.pop(name, None)
    # cmake and ninja may be this interpreter's, without its being activated.
    os.environ["PATH"] += f"{os.pathsep}{Path(sys.executable).parent}"
    calls = (args.call,) if args.call else ((0,) if args.stages else (1, 2, 3))
    if not args.rehearse:
        out = args.out or WORK / "out"
        results = ROOT / RESULTS if args.out is None else None
        return max([run_call(c, WORK, out, args.wheels, results, args.stages) for c in calls])
    out = args.out or WORK / "rehearsal"
    with tempfile.TemporaryDirectory() as folder:
        rehearsal.prepare(Path(folder), rehearsal.DEFAULT_FAULTS)
        return max([run_call(c, Path(folder), out, args.wheels, None, args.stages) for c in calls])


def run_call(
    call: int,
    work: Path,
    out: Path,
    wheels: Path | None,
    results: Path | None = None,
    chosen: tuple[str, ...] = (),
) -> int:
    """One call; 1 where a required stage failed. Call 0 is `chosen` stages of all. With a device
    the record is copied to `results` too."""
    if call == 1 or not same_sources(work):
        clear(work)
    patience = stages.PATIENCE if rehearsal.active() else 1
    today = datetime.date.today().isoformat()
    runner = Runner(work, out, f"gpu-check-{today}", stages.BUDGETS[call] * patience)
    runner.record["environment"] = facts.environment()
    earlier = device_of(runner)
    if not probed(runner):
        print("gpu-check needs a CUDA device that torch can use")
        return 1
    device = device_of(runner)
    if earlier and earlier["name"] != device["name"]:
        runner.record["stages"] = {"probe": runner.stages["probe"]}
    runner.rename(f"gpu-check-{short_name(device['name'])}-{today}")
    planned = stages.of_call(call, device["capability"], work, wheels, runner.stages)
    if chosen:
        planned = stages.only(planned, chosen)
    runner.run(stages.rehearsed(planned) if rehearsal.active() else planned, finished)
    text = runner.attempt("table", table.text, runner.record)
    if text is None:
        runner.save()
        text = "\n".join(runner.record["errors"]["table"])
    (out / "gpu-check.txt").write_text(text)
    print(text)
    if results is not None:
        publish(out / f"{runner.name}.json", results)
    if rehearsal.active():
        return int(not rehearsal.as_planned(runner.stages))
    return int(not all(stage["ok"] or not stage["required"] for stage in runner.stages.values()))


def publish(record: Path, results: Path) -> None:
    """Copies a record to `results`. One of the same day that is of other sources is kept, under a
    name with their digest."""
    target = results / record.name
    before = read(target).get("environment", {}).get("sources", "")
    if before and before != read(record)["environment"]["sources"]:
        target.rename(results / f"{record.stem}-{before}.json")
    shutil.copy(record, target)


def same_sources(work: Path) -> bool:
    """Whether the record that is there is of the code as it is."""
    before = read_record(work).get("environment", {})
    return bool(before.get("sources") == facts.sources())


def device_of(runner: Runner) -> dict[str, Any]:
    """What the probe has found; empty where it has found no device."""
    device: dict[str, Any] = runner.stages.get("probe", {}).get("result", {}).get("device", {})
    return device


def short_name(device: str) -> str:
    """A device's name as a part of a file's: "h200" of "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia")).strip("-")


def probed(runner: Runner) -> bool:
    """Runs the probe; where a forked child cannot use the device, every stage is a program of its
    own from then on."""
    probe = stages.rehearsed([stages.probe()]) if rehearsal.active() else [stages.probe()]
    runner.run(probe)
    if not device_of(runner):
        runner.fork = False
        runner.run(probe)
    runner.record["forked"] = runner.fork
    return bool(device_of(runner))


def finished(runner: Runner, name: str) -> None:
    """Ranks what a sweep has tried, and writes the winners into a table beside the record."""
    if not name.startswith("sweep-") or "result" not in runner.stages[name]:
        return
    winners.rank(runner.stages[name]["result"])
    sweeps = [
        stage["result"]
        for key, stage in runner.stages.items()
        if key.startswith("sweep-") and "result" in stage
    ]
    source = {
        "measured": f"{RESULTS}/{runner.name}.json",
        "date": datetime.date.today().isoformat(),
    }
    counts = winners.save(sweeps, source, runner.out / "tuning.json")
    runner.record["tuned rows"] = counts


if __name__ == "__main__":
    sys.exit(main())
