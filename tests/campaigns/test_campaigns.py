"""The campaigns themselves: what they do to checkpoints, and what they let pass."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from random import Random

import pytest

from tests.campaigns import damage, kill
from tests.campaigns.campaign import Ended
from tests.campaigns.damages import Damage, all_damages, permit
from tests.campaigns.kill import Strike
from tests.distributed.runs import Tolerance, difference

NEWEST_DAMAGED = Damage("cut", "trainer.json")
ALL_DAMAGED = Damage("all cut")
KILLED = -signal.SIGKILL


def checkpoints(folder: Path) -> tuple[Path, Path]:
    """Two checkpoints of the same files with other bytes, the newer first."""
    made = folder / "step-00000003", folder / "step-00000002"
    for number, checkpoint in enumerate(made):
        checkpoint.mkdir(parents=True)
        for name in ("a", "b", "c"):
            (checkpoint / name).write_bytes(f"{name}{number}".encode() * 10)
    return made


def contents(folder: Path) -> dict[str, object]:
    """Everything below `folder`, by path: its kind, its permissions and a file's bytes."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.read_bytes() if os.access(path, os.R_OK) and path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


def test_every_damage_changes_what_is_there(tmp_path: Path) -> None:
    names = all_damages(checkpoints(tmp_path / "names")[0])
    assert len(names) > 40
    for number, chosen in enumerate(names):
        root = tmp_path / str(number)
        newest, older = checkpoints(root)
        before = contents(root)
        chosen.apply(newest, older, Random(number))
        after = contents(root)
        permit(root)
        assert after != before, chosen
        kept = {path: of for path, of in before.items() if path.startswith(older.name)}
        assert (kept.items() <= after.items()) == chosen.spares_older, chosen


@pytest.mark.parametrize(
    ("done", "befell", "outcome", "failure"),
    [
        (Ended([1], "", "error: all damaged", ""), ALL_DAMAGED, "refused", ""),
        (Ended([1], "", "error: a", ""), NEWEST_DAMAGED, "failed", "beside an intact checkpoint"),
        (Ended([1], "", "error: a\nerror: b", ""), ALL_DAMAGED, "failed", "no single line"),
        (Ended([1], "", "", ""), ALL_DAMAGED, "failed", "no single line"),
        (Ended([1, 0], "", "error: a", ""), ALL_DAMAGED, "failed", "no single line"),
        (Ended([1], "", "error: a", "a traceback"), ALL_DAMAGED, "failed", "a traceback"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line_or_not_at_all(
    tmp_path: Path, done: Ended, befell: Damage, outcome: str, failure: str
) -> None:
    run = damage.Broken(damage.VARIANTS[0], tmp_path, tmp_path, tmp_path)
    got, why = damage.judge(done, befell, True, run, tmp_path)
    assert got == outcome and failure in why and bool(failure) == bool(why)


@pytest.mark.parametrize(
    ("codes", "out", "err", "number", "fails"),
    [
        ([KILLED, 1], "step 1/6", "error: rank 0 is gone", signal.SIGKILL, False),
        ([KILLED, 1], "step 1/6", "", signal.SIGKILL, True),
        ([KILLED, -signal.SIGABRT], "step 1/6", "error: gone", signal.SIGKILL, True),
        ([KILLED, KILLED], "", "", signal.SIGKILL, False),
        ([1], "", "error: killed", signal.SIGKILL, True),
        ([0, 0], "step 1/6", "", signal.SIGTERM, False),
        ([-signal.SIGTERM], "", "", signal.SIGTERM, False),
        ([-signal.SIGTERM, 1], "", "error: rank 0 is gone", signal.SIGTERM, False),
        ([-signal.SIGTERM], "step 1/6", "", signal.SIGTERM, True),
        ([1], "step 1/6", "error: interrupted", signal.SIGINT, True),
    ],
)
def test_a_signal_is_the_end_of_a_step(
    codes: list[int | None], out: str, err: str, number: signal.Signals, fails: bool
) -> None:
    planned = Strike(number, "", 0.0, 0 if len(codes) > 1 else None, group=False)
    assert bool(kill.complaint(Ended(codes, out, err, ""), planned)) == fails


def test_runs_differ_by_any_figure_but_clocks(tmp_path: Path) -> None:
    def write(name: str, **figures: object) -> Path:
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        (run / "completions.jsonl").write_text("")
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, **figures}) + "\n")
        return tmp_path / name

    plain = write("plain", **{"loss/policy": 0.5})
    other = write("other", **{"loss/policy": 0.50001, "time/step": 1.0})
    fewer = write("fewer")
    assert "loss/policy is 0.50001 instead of 0.5" in difference(other, plain)
    assert "loss/policy is 'missing'" in difference(fewer, plain, Tolerance(1.0, 1.0))
    with pytest.raises(OSError):  # the figures agree, and there are no weights
        difference(other, plain, Tolerance(1e-4, 0.0))
