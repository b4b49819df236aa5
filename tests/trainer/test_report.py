"""What a finished run leaves: the table, summary.json and the plot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from papo.errors import PapoError
from papo.record.report import Report, _series, plot, print_table, summary

BEFORE = {"accuracy": 0.125, "pass_at_k": 0.5, "truncated": 0.25, "problems": 4.0, "greedy": 0.0}
AFTER = {"accuracy": 0.5, "pass_at_k": 0.75, "truncated": 0.0, "problems": 4.0, "greedy": 0.25}


def step_row(step: int, seconds: float | None = 1.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "reward/mean": 0.1 * step, "time/step": seconds, **more}


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def report(folder: Path, enabled: bool = True) -> Report:
    made = Report(folder, enabled)
    made.add("before", 0, BEFORE)
    made.add("after", 3, AFTER)
    return made


def test_summary_holds_evaluations_their_change_and_the_last_step() -> None:
    evaluations = [{"label": "before", "step": 0, **BEFORE}, {"label": "after", "step": 3, **AFTER}]
    steps = [step_row(1, 9.0), step_row(2, 2.0), step_row(3, 3.0)]
    made = summary(evaluations, steps)
    assert made["evaluations"] == evaluations and made["steps"] == 3
    assert made["change"] == {
        "accuracy": 0.375,
        "pass_at_k": 0.25,
        "greedy": 0.25,
        "truncated": -0.25,
    }
    assert made["step_seconds_median"] == 3.0 and made["last_step"] == steps[-1]
    rewards = [{**e, "reward": r} for e, r in zip(evaluations, (0.25, 0.75), strict=True)]
    assert summary(rewards, [])["change"]["reward"] == 0.5
    del evaluations[1]["greedy"]
    assert "greedy" not in summary(evaluations, [])["change"]
    assert "change" not in summary(evaluations[:1], []) and "last_step" not in summary([], [])


def delta_rows(count: int) -> list[dict[str, Any]]:
    """Steps whose entropy changes two predictions rank right and the last the wrong way; polarity
    predicts none of the last step."""
    return [
        step_row(
            k,
            **{
                "entropy/measured_delta": float(k),
                "entropy/predicted_delta": float(k**3),
                "entropy/predicted_delta_polarity": None if k == count else float(k),
                "entropy/predicted_delta_instant": -float(k),
            },
        )
        for k in range(1, count + 1)
    ]


def test_summary_and_plot_tell_how_well_entropy_changes_were_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    rows = [*delta_rows(9), step_row(10), step_row(11, **{"entropy/measured_delta": None})]
    assert summary([], rows)["prediction_correlation"] == {
        "predicted_delta": pytest.approx(1.0),
        "predicted_delta_polarity": pytest.approx(1.0),
        "predicted_delta_instant": pytest.approx(-1.0),
    }
    few = summary([], delta_rows(8))["prediction_correlation"]
    assert list(few.values()) == [pytest.approx(1.0), None, pytest.approx(-1.0)]
    drawn: list[tuple[str, str]] = []
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, path, **_: drawn.extend((a.get_title(), a.get_xlabel()) for a in self.axes),
    )
    plot(rows, tmp_path / "curves.png")
    assert [d for d in drawn if "entropy change" in d[0]] == [
        ("entropy change of a step (Spearman 1.00)", "predicted, first order in the weights"),
        ("entropy change of a step (Spearman 1.00)", "predicted, polarity through AdamW"),
        ("entropy change of a step (Spearman -1.00)", "predicted, polarity of the gradient alone"),
    ]


def test_an_evaluation_of_the_same_label_replaces_the_earlier_one(tmp_path: Path) -> None:
    made = report(tmp_path)
    made.add("after", 5, {**AFTER, "accuracy": 0.9})
    assert [(e["label"], e["step"], e["accuracy"]) for e in made.evaluations] == [
        ("before", 0, 0.125),
        ("after", 5, 0.9),
    ]
    assert json.loads(json.dumps(made.evaluations)) == made.evaluations


def test_a_finished_run_has_table_summary_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gaps: dict[str, Any] = {"entropy/mean": None, "reward/mean": None, "phase/phi": 0.5}
    gaps["entropy/predicted_delta"] = 1e-3
    rows = [step_row(1), {"step": 1, "eval/accuracy": 0.1}, step_row(2, **gaps), step_row(3)]
    report(tmp_path).finish(write_rows(tmp_path, rows))
    made = json.loads((tmp_path / "summary.json").read_text())
    assert made["steps"] == 3 and made["change"]["accuracy"] == 0.375
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "summary.json", "curves.png"}
    table = capsys.readouterr().out
    lines = [line.replace("│", " ").split() for line in table.splitlines()]
    assert ["before", "0", "0.125", "0.500", "0.000", "0.250"] in lines
    assert ["after", "3", "0.500", "0.750", "0.250", "0.000"] in lines
    assert ["change", "+0.375", "+0.250", "+0.250", "-0.250"] in lines
    assert "4 problems, never trained on" in table and str(tmp_path / "final") in table


def test_the_table_shows_mean_rewards_beside_accuracies(capsys) -> None:
    """A verifier whose right answers earn 0.9: the accuracy is 0, the reward is not."""
    figures = {"accuracy": 0.0, "pass_at_k": 0.0, "greedy": 0.0, "problems": 4.0}
    print_table(
        [
            {"label": "before", "step": 0, **figures, "reward": 0.3, "reward_greedy": 0.45},
            {"label": "after", "step": 3, **figures, "reward": 0.9, "reward_greedy": 0.9},
        ]
    )
    table = capsys.readouterr().out
    lines = [line.replace("\u2502", " ").split() for line in table.splitlines()]
    assert ["after", "3", *["0.000"] * 3, "0.900", "0.900"] in lines
    assert ["change", *["+0.000"] * 3, "+0.600", "+0.450"] in lines


def test_a_run_without_evaluations_or_steps_is_closed_too(tmp_path: Path, capsys) -> None:
    Report(tmp_path, enabled=True).finish(tmp_path / "metrics.jsonl")
    assert json.loads((tmp_path / "summary.json").read_text()) == {"evaluations": [], "steps": 0}
    assert not (tmp_path / "curves.png").exists()
    assert "Held-out" not in capsys.readouterr().out


def test_other_ranks_keep_evaluations_and_write_nothing(tmp_path: Path, capsys) -> None:
    made = report(tmp_path, enabled=False)
    made.finish(tmp_path / "metrics.jsonl")
    assert len(made.evaluations) == 2
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_null_and_missing_figures_are_gaps() -> None:
    values = _series([{"a": 1}, {"a": None}, {}, {"a": 2.5}], "a")
    assert values[0] == 1.0 and values[3] == 2.5
    assert math.isnan(values[1]) and math.isnan(values[2])


def test_a_plot_of_nothing_but_gaps_is_a_plot(tmp_path: Path) -> None:
    plot([{"step": 1}], tmp_path / "curves.png")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(
        PapoError, match=r"cannot write the report in .*gone: No such file"
    ) as caught:
        report(gone).finish(gone / "metrics.jsonl")
    assert "\n" not in str(caught.value) and "output_dir" in str(caught.value)
