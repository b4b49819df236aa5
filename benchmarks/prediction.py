"""How well finished runs predicted their entropy changes.

``python -m benchmarks.prediction RUN...`` reads metrics.jsonl and config.yaml of each run's
folder. Spearman's correlation with the measured change over all measured steps, with the 2.5 and
97.5 percentiles of 2000 bootstrap samples of the steps (which depend on each other: the true
interval is wider), and Pearson's of the differences from step to step, in which a trend that both
share has little part. A prediction that a run did not make (`metrics.predict_share` 0) is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.harness import environment, write_json
from papo.policy.prediction import PREDICTIONS, pearson, rank_correlation
from papo.record.jsonl import read_rows

SAMPLES = 2000
# What the predictions follow from is kept with them.
KEPT = (*PREDICTIONS, "entropy/measured_delta", "entropy/mean", "optim/grad_norm")


def interval(predicted: Tensor, measured: Tensor) -> list[float]:
    """Percentiles of the rank correlation over samples of the steps, drawn with replacement."""
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(measured), (SAMPLES, len(measured)), generator=g)
    found = [rank_correlation(predicted[i].tolist(), measured[i].tolist()) for i in drawn]
    ends: list[float] = torch.tensor(found).nanquantile(torch.tensor([0.025, 0.975])).tolist()
    return ends


def figures(steps: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The correlations of one prediction, None where there is none."""
    found = [row for row in steps if row[name] is not None]
    if not found:
        return None
    pairs = torch.tensor(
        [[row[name], row["entropy/measured_delta"]] for row in found], dtype=torch.float64
    )
    predicted, measured = pairs.T
    return {
        "spearman": rank_correlation(predicted.tolist(), measured.tolist()),
        "interval": interval(predicted, measured),
        "pearson_of_differences": pearson(predicted.diff(), measured.diff()),
    }


def result(run: Path) -> dict[str, Any]:
    """A run's options, correlations and series."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    rows = read_rows(run / "metrics.jsonl")
    steps = [row for row in rows if row.get("entropy/measured_delta") is not None]
    return {
        "config": config["name"],
        "method": config["method"],
        "seed": config["seed"],
        "steps": len(steps),
        **{label: figures(steps, name) for name, label in PREDICTIONS.items()},
        "series": [{"step": row["step"], **{k: row[k] for k in KEPT}} for row in steps],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--command", help="how the runs were made, for the record")
    parser.add_argument("--save", action="store_true", help="benchmarks/results/prediction-*.json")
    args = parser.parse_args()
    results = [result(run) for run in args.runs]
    print(f"{'':<42}{'Spearman':>9}{'interval':>16}{'Pearson of differences':>24}")
    for r in results:
        for label in PREDICTIONS.values():
            name, f = f"{r['method']}, seed {r['seed']}: {label}", r[label]
            if f is None:
                continue
            low, high = f["interval"]
            print(
                f"{name:<46}{f['spearman']:5.2f}{low:9.2f} to {high:.2f}"
                f"{f['pearson_of_differences']:16.2f}"
            )
    if args.save:
        record = {"environment": environment(), "command": args.command, "runs": results}
        print("wrote", write_json("prediction", record).name)


if __name__ == "__main__":
    main()
