"""``python -m benchmarks.gpu_check``: everything that needs a GPU; benchmarks/README.md says how
it is used.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_check import facts, rehearsal, stages, table, winners
from benchmarks.gpu_check.files import read
from benchmarks.gpu_check.runner import Runner, clear
from benchmarks.harness import ROOT, host_environment

WORK = ROOT / "build" / "gpu-check"
RESULTS = "benchmarks/results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--call", type=int, choices=(1, 2), help="one of the two; both in turn")
    parser.add_argument("--out", type=Path, help="for what is written, at most 8 files")
    parser.add_argument("--wheels", type=Path, help="a folder of the peers' wheels")
    parser.add_argument("--rehearse", action="store_true", help="every stage, without a GPU")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    # cmake and ninja may be this interpreter's, without its being activated.
    os.environ["PATH"] += f"{os.pathsep}{Path(sys.executable).parent}"
    name = f"gpu-check-{datetime.date.today().isoformat()}"
    out = args.out or WORK / "out"
    calls = (args.call,) if args.call else (1, 2)
    if not args.rehearse:
        status = max([run_call(call, WORK, out, name, args.wheels) for call in calls])
        if args.out is None:
            shutil.copy(out / f"{name}.json", ROOT / RESULTS)
        return status
    with tempfile.TemporaryDirectory() as folder:
        rehearsal.prepare(Path(folder), rehearsal.DEFAULT_FAULTS)
        return max([run_call(call, Path(folder), out, name, args.wheels) for call in calls])


def run_call(call: int, work: Path, out: Path, name: str, wheels: Path | None) -> int:
    """One call; 1 where a required stage failed."""
    if call == 1 or not same_commit(work):
        clear(work)
    patience = stages.PATIENCE if rehearsal.active() else 1
    runner = Runner(work, out, name, stages.BUDGETS[call] * patience)
    runner.record["environment"] = facts.environment()
    if not probed(runner):
        print("gpu-check needs a CUDA device that torch can use")
        return 1
    device = runner.stages["probe"]["result"]["device"]
    if call == 1:
        planned = stages.first_call(device["capability"], work)
    else:
        planned = stages.second_call(device["capability"], work, wheels, runner.stages)
    runner.run(stages.rehearsed(planned) if rehearsal.active() else planned, finished)
    text = runner.attempt("table", table.text, runner.record)
    if text is None:
        runner.save()
        text = "\n".join(runner.record["errors"]["table"])
    (out / "gpu-check.txt").write_text(text)
    print(text)
    if rehearsal.active():
        return int(not rehearsal.as_planned(runner.stages))
    return int(not all(stage["ok"] or not stage["required"] for stage in runner.stages.values()))


def same_commit(work: Path) -> bool:
    """Whether the record that is there is of the code as it is."""
    before = read(work / "record.json").get("environment", {})
    return bool(before.get("commit") == host_environment()["commit"])


def probed(runner: Runner) -> bool:
    """Runs the probe; where a forked child cannot use the device, every stage is a program of its
    own from then on."""
    probe = stages.rehearsed([stages.probe()]) if rehearsal.active() else [stages.probe()]
    runner.run(probe)
    if not runner.stages["probe"].get("result", {}).get("device"):
        runner.fork = False
        runner.run(probe)
    runner.record["forked"] = runner.fork
    return bool(runner.stages["probe"].get("result", {}).get("device"))


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
