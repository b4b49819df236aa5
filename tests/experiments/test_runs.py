"""Which whole runs are started, with what, and which are not started again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.validity import runs
from papo.config import load_config
from papo.errors import PapoError


class Trainer:
    """Stands for train.py: writes the rows of as many steps as it is told."""

    def __init__(self, steps: int, status: int = 0) -> None:
        self.steps, self.status = steps, status
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], cwd: Path) -> Any:
        self.commands.append(command)
        folder = Path(next(w for w in command if w.startswith("output_dir=")).partition("=")[2])
        folder.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"step": i, "time/step": 1.0}) for i in range(self.steps)]
        (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        return subprocess.CompletedProcess(command, self.status)


def trainer(monkeypatch: pytest.MonkeyPatch, *args: int) -> Trainer:
    fake = Trainer(*args)
    monkeypatch.setattr(runs.subprocess, "run", fake)
    return fake


def test_every_method_and_seed_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = trainer(monkeypatch, 40)
    runs.main(tmp_path)
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["dapo-1", "dapo-2", "grpo-1", "grpo-2", "papo-1", "papo-2"]
    command = " ".join(fake.commands[0])
    assert "train.py --config configs/smollm2-arithmetic.yaml --set seed=1 " in command
    assert command.endswith("--resume auto")
    assert "evaluation.before=false" in command and "checkpoint.every=10" in command
    runs.main(tmp_path)
    assert len(fake.commands) == 6, "finished runs are skipped"


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = trainer(monkeypatch, 3)
    with pytest.raises(PapoError, match="grpo-2: the run stopped before its 4 steps"):
        runs.main(tmp_path, ["steps=4"], ["grpo"], [2])
    fake.steps = 4
    runs.main(tmp_path, ["steps=4"], ["grpo"], [2])
    assert len(fake.commands) == 2


def test_a_failed_run_ends_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = trainer(monkeypatch, 0, 3)
    with pytest.raises(PapoError, match="ended with status 3"):
        runs.main(tmp_path)
    assert len(fake.commands) == 1


def test_a_wrong_option_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = trainer(monkeypatch, 40)
    with pytest.raises(PapoError, match="step"):
        runs.main(tmp_path, ["stpes=4"])
    assert fake.commands == []


def test_a_run_of_other_options_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(monkeypatch, 4)
    runs.main(tmp_path, ["steps=4"], ["grpo"], [2])
    folder = (tmp_path / "runs" / "grpo-2").resolve()
    made = load_config(
        runs.ROOT / runs.CONFIGS["grpo"],
        ["seed=2", f"output_dir={folder}", *runs.CHANGES, "steps=4"],
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")))
    runs.main(tmp_path, ["steps=4"], ["grpo"], [2])
    for changed, told in (("optim.lr=1e-3", "optim.lr"), ("metrics.predict_share=1", "metrics")):
        with pytest.raises(PapoError, match=f"grpo-2: a run with other options .*{told}"):
            runs.main(tmp_path, ["steps=4", changed], ["grpo"], [2])
