"""From made-up records of the validity study to its summary, its tables and its images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from docs.drawings import asymmetry, predicted_runs, prediction_ranks, prediction_scatter
from experiments.validity import statistics, summary, tables
from experiments.validity.records import rows as rows_of
from experiments.validity.summary import batches, by_token, reading, whole_runs
from papo.errors import PapoError
from papo.policy.prediction import rank_correlation
from tests.experiments import records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return records.write_all(tmp_path_factory.mktemp("validity"), batches=12, detailed=9)


@pytest.fixture(scope="module")
def results(folder: Path) -> Path:
    """The folder of the summary that `main` wrote, of fewer samples than the study has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "SAMPLES", 300)
        patch.setattr(by_token, "SAMPLES", 300)
        summary.main(folder, folder / "results")
    return folder / "results"


@pytest.fixture(scope="module")
def found(results: Path) -> dict[str, Any]:
    return tables.newest(results)


# ---- the summary --------------------------------------------------------------------------------


def test_a_batch_is_predicted_by_its_sums_and_its_first_order(
    folder: Path, found: dict[str, Any]
) -> None:
    rows = rows_of(folder / "isolated-mawps.jsonl")
    measured = [row["measured"]["adam"]["4e-06"] for row in rows]
    adam = found["isolated"]["mawps"]["kinds"]["adam"]
    assert adam["size"] == 4e-6 and adam["batches"] == len(rows)
    for name, predicted in {
        "A·L": [sum(row["scores"]["A·L"]) for row in rows],
        "averaged": [row["first_order"]["adam"]["averaged"] for row in rows],
    }.items():
        value = adam["predictors"][name]["value"]
        assert value == pytest.approx(rank_correlation(predicted, measured), abs=1e-4)
    own = [4e-6 * row["first_order"]["adam"]["averaged"] for row in rows]
    assert adam["points"]["averaged"] == pytest.approx(own, rel=1e-3), "in nats"


def test_sizes_are_compared_on_the_batches_that_have_them_all(found: dict[str, Any]) -> None:
    kinds = found["isolated"]["chain_sum"]
    assert [s["batches"] for s in kinds["sizes"]["sgd"].values()] == [9, 9, 9]
    assert list(kinds["sizes"]["adam-bf16"]) == ["4e-06", "1.6e-05"]
    rest = [s["second order"] for s in kinds["sizes"]["sgd"].values()]
    assert rest[0] < rest[1] < rest[2], "the records' remainder grows with the step"
    assert kinds["kinds"]["adam-bf16"]["batches"] == 9
    assert kinds["kinds"]["sgd"]["batches"] == 12


def test_tokens_without_an_advantage_are_left_out(folder: Path) -> None:
    tokens = reading.tokens(folder / "tokens-mawps")
    assert len(tokens["unit"]) == 9 * 45 and tokens["unit"].unique().tolist() == list(range(9))
    expected = tokens["weight"] * tokens["advantage"] * tokens["unit_polarity"]
    assert tokens["polarity"] == pytest.approx(expected)
    assert reading.tokens(folder / "nothing") == {}


def test_true_effects_are_in_nats_at_the_main_size(folder: Path) -> None:
    tokens = reading.tokens(folder / "tokens-chain_sum")
    sizes = {"sgd": 0.5, "adam": 2.0}
    means = by_token.effects(tokens, sizes)["kinds"]["adam"]["scores"]["polarity"]["deciles"]
    lowest = tokens["true adam"][tokens["polarity"].argsort()[:41]]
    assert means[0] == pytest.approx(float(2.0 * lowest.mean())), "a tenth of 405, rounded up"
    bins = by_token.asymmetry(tokens, sizes)
    assert sum(bins["positive"]["tokens"]) == int((tokens["advantage"] > 0.0).sum())
    high = (tokens["p"] > 0.8) & (tokens["advantage"] < 0.0)
    mean = bins["negative"]["true sgd"][-1]["value"]
    assert mean == pytest.approx(float(0.5 * tokens["true sgd"][high].mean()))


def test_an_empty_bin_has_no_mean(folder: Path) -> None:
    tokens = reading.tokens(folder / "tokens-chain_sum")
    low = {name: values[tokens["p"] < 0.8] for name, values in tokens.items()}
    bins = by_token.asymmetry(low, {"sgd": 1.0, "adam": 1.0})
    assert bins["positive"]["tokens"][-1] == 0 and bins["positive"]["predicted"][-1] is None


def test_shares_of_an_update(found: dict[str, Any], folder: Path) -> None:
    rows = [r for r in rows_of(folder / "own-chain_sum.jsonl") if r["kind"] == "sgd"]
    of_sgd = found["own"]["chain_sum"]["sgd"]
    own, others = (
        sum(abs(part(row)) for row in rows)
        for part in (lambda r: r["own"], lambda r: r["total"] - r["own"])
    )
    shares = of_sgd["shares"]
    assert shares["own"] / shares["others"] == pytest.approx(own / others, rel=1e-3)
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-4)
    assert of_sgd["polarity with own"]["value"] == pytest.approx(1.0), "as the records are made"


def test_whole_runs_are_means_over_seeds(found: dict[str, Any], folder: Path) -> None:
    assert list(found["runs"]) == ["papo", "grpo", "dapo"]
    dapo = found["runs"]["dapo"]
    assert dapo["series"]["1"]["step"] == list(range(1, 40)), "the first step has no average"
    name = "polarity through AdamW"
    values = []
    for seed in ("1", "2"):
        rows = rows_of(folder / "runs" / f"dapo-{seed}" / "metrics.jsonl")[1:]
        pair = [
            [row[key] for row in rows]
            for key in (whole_runs.PREDICTIONS[name], whole_runs.MEASURED)
        ]
        values.append(rank_correlation(*(torch.tensor(x).diff().tolist() for x in pair)))
    assert dapo["predictions"][name]["differences"]["value"] == pytest.approx(
        sum(values) / 2, abs=1e-4
    )


def test_a_summary_of_part_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SAMPLES", 100)
    g = torch.Generator().manual_seed(0)
    rows = [records.batch(i, True, g) for i in range(9)]
    path = tmp_path / "isolated-chain_sum.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"batch": 9, "mea')
    part = summary.summarized(tmp_path)
    assert part["isolated"]["chain_sum"]["batches"] == 9, "the unfinished line is left out"
    assert part["tokens"] == part["own"] == part["tabular"] == part["runs"] == {}
    part |= {"date": "2026-01-01", "environment": {"cpu": "a CPU", "torch": "2"}}
    for name, table in tables.TABLES.items():
        assert isinstance(table(part), str), name


def test_no_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PapoError, match=r"no batches there; expected isolated-\*\.jsonl"):
        summary.main(tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PapoError, match=r"no validity-\*\.json"):
        tables.newest(tmp_path)


def test_a_summary_is_small_and_plain(
    results: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = results.glob("validity-*.json")
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert reading.rounded([1.0 / 3.0, float("nan"), {"a": 7}]) == [0.33333, None, {"a": 7}]
    monkeypatch.setattr(summary, "LARGEST", 10)
    monkeypatch.setattr(summary, "summarized", lambda records: {})
    with pytest.raises(PapoError, match="bytes; expected at most 10"):
        summary.main(folder, folder / "other")


def test_the_middle_size_is_the_main_one() -> None:
    assert reading.main_size(["1.6e-05", "4e-06", "1e-06"]) == "4e-06"
    assert reading.main_size(["1.6e-05", "4e-06"]) == "4e-06"


def test_differences_are_of_the_same_batches(found: dict[str, Any]) -> None:
    sgd = found["isolated"]["chain_sum"]["kinds"]["sgd"]
    for pair, difference in sgd["differences"].items():
        values = [sgd["predictors"][name]["value"] for name in pair.split(" - ")]
        assert difference["value"] == pytest.approx(values[0] - values[1], abs=1e-4)
    assert len(sgd["differences"]) == len(batches.COMPARED)


# ---- tables and images --------------------------------------------------------------------------


def test_tables_replace_what_stands_between_their_markers(found: dict[str, Any]) -> None:
    page = "a\n<!-- table: goal -->\n\nold\n\n<!-- end -->\nb\n"
    once = tables.filled(page, found)
    assert once.startswith("a\n<!-- table: goal -->\n\n|  | lowest Spearman") and "old" not in once
    assert once.endswith("|\n\n<!-- end -->\nb\n")
    assert tables.filled(once, found) == once
    with pytest.raises(PapoError, match="table 'gaol': not one of source, answer"):
        tables.filled(page.replace("goal", "gaol"), found)


def test_the_goal_is_met_where_all_three_parts_are(found: dict[str, Any]) -> None:
    goal = json.loads(json.dumps(found))
    for task in goal["isolated"].values():
        task["seconds"] |= {"own quarter": 0.1, "sampling": 1.0}
        for kind in ("sgd", "adam"):
            predictors = task["kinds"][kind]["predictors"]
            for name in ("covariance", "A·L"):
                predictors[name] = {"value": 0.5, "interval": [0.3, 0.7]}
            predictors["averaged"] = {"value": 0.93, "interval": [0.8, 0.97]}
    line = "| first order: averaged: a quarter of each |"
    rows = {row for row in tables.goal(goal).splitlines() if row.startswith(line)}
    assert rows == {f"{line} 0.93 | yes | 3% | **yes** |"}
    mawps = goal["isolated"]["mawps"]["kinds"]["adam"]["predictors"]
    mawps["A·L"]["interval"][1] = 0.81
    assert f"{line} 0.93 | no | 3% | no |" in tables.goal(goal)


def test_numbers_in_tables() -> None:
    assert [tables.figure(x) for x in (0.996, -0.001, -0.5, None)] == ["1.00", "0.00", "−0.50", "–"]
    small = [tables.short(x) for x in (-1.23e-4, 4e-6, 0.0123, 0.0, None)]
    assert small == ["−1.2 × 10⁻⁴", "4.0 × 10⁻⁶", "0.012", "0", "–"]
    assert tables.estimate({"value": 0.5, "interval": [-0.1, 0.75]}) == "0.50 [−0.10, 0.75]"
    assert tables.share(0.666) == "67%"


@pytest.mark.parametrize(
    "script", [prediction_scatter, prediction_ranks, asymmetry, predicted_runs], ids=str
)
def test_an_image_is_of_the_summary(script: Any, found: dict[str, Any]) -> None:
    image = script.draw(found, "results/x.json")
    ElementTree.fromstring(image)
    assert "results/x.json" in image and "nan" not in image
    assert script.draw(json.loads(json.dumps(found)), "results/x.json") == image


def test_a_point_of_the_scatter_is_a_batch(found: dict[str, Any]) -> None:
    image = prediction_scatter.draw(found, "")
    dots = [part.split('"')[0].count("M") for part in image.split('<path d="')[1:]]
    assert sorted(set(dots)) == [1, 12], "a legend's dots, and 12 batches of a task in each panel"
    assert dots.count(12) == 2 * 4
    value = found["isolated"]["mawps"]["kinds"]["sgd"]["predictors"]["polarity"]["value"]
    assert f"ρ = {value:.2f}" in image


# ---- the page -----------------------------------------------------------------------------------

SUMMARIES = sorted(tables.RESULTS.glob("validity-*.json"))[-1:]


def test_the_page_has_every_table() -> None:
    page = tables.PAGE.read_text()
    assert [name for name in tables.TABLES if page.count(f"<!-- table: {name} -->") != 1] == []


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda path: path.name)
def test_the_pages_tables_are_those_of_the_newest_summary(path: Path) -> None:
    page = tables.PAGE.read_text()
    assert path.stat().st_size <= summary.LARGEST
    assert tables.filled(page, tables.newest()) == page, (
        "run: python -m experiments.validity tables"
    )


def test_the_seed_of_samples_is_fixed() -> None:
    statistics._drawn.cache_clear()
    first = statistics.resamples(12, 10)
    statistics._drawn.cache_clear()
    assert statistics.resamples(12, 10).equal(first)
