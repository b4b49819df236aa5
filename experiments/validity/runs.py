"""Part 5: starts the whole runs, one after the other.

A run that has all its steps is not started again, and one that was cut short goes on from its
newest checkpoint, or begins again where it has none.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from papo.config import TrainConfig, load_config
from papo.config.resume import differences
from papo.errors import PapoError
from papo.record.jsonl import read_rows

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "papo": "configs/smollm2-arithmetic.yaml",
    "grpo": "configs/grpo.yaml",
    "dapo": "configs/dapo.yaml",
}
SEEDS = (1, 2)
CHANGES = (
    "evaluation.before=false",
    "evaluation.after=false",
    "checkpoint.every=10",
    "checkpoint.keep=1",
)


def main(
    records: Path,
    overrides: Sequence[str] = (),
    methods: Sequence[str] = tuple(CONFIGS),
    seeds: Sequence[int] = SEEDS,
) -> None:
    """Train by every method with every seed, in ``runs/<method>-<seed>`` of the records' folder.

    Args:
        records: the records' folder.
        overrides: further options of the configs, `section.key=value`.
        methods: keys of `CONFIGS`.
        seeds: of the runs.

    Raises:
        PapoError: an option is wrong, or a run failed; those before it are kept.
    """
    for seed in seeds:
        for method in methods:
            folder = (records / "runs" / f"{method}-{seed}").resolve()
            options = [f"seed={seed}", f"output_dir={folder}", *CHANGES, *overrides]
            config = load_config(ROOT / CONFIGS[method], options)
            _check(folder, config)
            wanted, done = config.steps, len(_steps(folder))
            print(f"{folder.name}: {done} of {wanted} steps are there", flush=True)
            if done < wanted:
                _train(CONFIGS[method], options)
                if len(_steps(folder)) < wanted:
                    raise PapoError(f"{folder}: the run stopped before its {wanted} steps")


def _check(folder: Path, config: TrainConfig) -> None:
    """Refuse a run that was made with other options."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    saved = yaml.safe_load(path.read_text())
    told = differences(saved, config)
    if saved["metrics"] != config.model_dump(mode="json")["metrics"]:
        told.append("metrics")
    if told:
        raise PapoError(f"{folder}: a run with other options ({'; '.join(told)})")


def _steps(folder: Path) -> set[int]:
    """Steps in the run's record."""
    rows = read_rows(folder / "metrics.jsonl")
    return {row["step"] for row in rows if "time/step" in row}


def _train(config: str, options: list[str]) -> None:
    sets = [word for option in options for word in ("--set", option)]
    command = [sys.executable, "train.py", "--config", config, *sets, "--resume", "auto"]
    status = subprocess.run(command, cwd=ROOT).returncode
    if status:
        raise PapoError(f"{' '.join(command)}: ended with status {status}")
