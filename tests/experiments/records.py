"""Records of the validity study as its measuring part writes them, of made-up numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "sgd": (0.001, 0.004, 0.016),
    "adam": (1e-6, 4e-6, 1.6e-5),
    "sign": (1e-6, 4e-6, 1.6e-5),
    "adam-bf16": (4e-6, 1.6e-5),
}
MAIN = {"sgd": 0.004, "adam": 4e-6, "sign": 4e-6, "adam-bf16": 4e-6}
SCORES = ("polarity", "sampled term", "STEER, signed", "covariance", "A·L")
WHOLE = ("own", "others", "averaged", "own, rounded", "averaged, rounded")
FIRST_ORDER = (
    *("own", "own quarter", "own prompt", "another", "others", "averaged", "averaged prompts"),
    *(f"others, last {k} blocks" for k in (1, 4, 8, 15)),
    *("others, every 16th", "others, every 256th"),
)
SECONDS = ("sampling", "policy gradient", "own", "own quarter", "own prompt", "pass")


def write_all(folder: Path, batches: int = 24, detailed: int = 10) -> Path:
    """Every record, of two tasks; `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(3)
    for task in ("chain_sum", "mawps"):
        rows = [batch(i, i < detailed, g) for i in range(batches)]
        _write(folder / f"isolated-{task}.jsonl", rows)
        (folder / f"tokens-{task}").mkdir(exist_ok=True)
        for i in range(detailed):
            torch.save(tokens(60, g), folder / f"tokens-{task}" / f"{i}.pt")
        _write(folder / f"own-{task}.jsonl", [own(i, g) for i in range(4) for _ in range(24)])
    tabular = {"sizes": [1e-3, 1e-2], "ratio": [0.9999, 0.99], "remainder": [1e-8, 1e-6]}
    (folder / "tabular.json").write_text(json.dumps({**tabular, "slope": 2.0}))
    for method in ("papo", "grpo", "dapo"):
        for seed in (1, 2):
            _write(folder / "runs" / f"{method}-{seed}" / "metrics.jsonl", run(40, g))
    return folder


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _normal(g: torch.Generator) -> float:
    return float(torch.randn((), generator=g))


def batch(number: int, detailed: bool, g: torch.Generator) -> dict[str, Any]:
    """A row whose change is linear in the size of the step up to a part of second order."""
    truth = _normal(g) - 0.8
    kinds = SIZES if detailed else {k: v for k, v in SIZES.items() if k != "adam-bf16"}
    measured = {
        kind: {
            repr(size): 1e-3 * (truth * size / MAIN[kind] + 0.05 * (size / MAIN[kind]) ** 2)
            for size in (sizes if detailed else (MAIN[kind],))
        }
        for kind, sizes in kinds.items()
    }
    first_order = {
        kind: {
            name: 1e-3 * (truth + 0.02 * i * _normal(g)) / MAIN[kind]
            for i, name in enumerate(WHOLE if kind == "adam-bf16" else FIRST_ORDER)
        }
        for kind in kinds
    }
    scores = {name: [1e-2 * (truth + 1.5 * _normal(g)), 1e-2 * _normal(g)] for name in SCORES}
    return {
        "batch": number,
        "tokens": 400 + number,
        "reward": 0.4,
        "length": 12.0,
        "measured": measured,
        "scores": scores,
        "polarity over step length": sum(scores["polarity"]) / 3.0,
        "first_order": first_order,
        "cosine": {name: 0.9 for name in FIRST_ORDER[1:6]},
        "seconds": {name: 1.0 + i for i, name in enumerate(SECONDS)},
    }


def tokens(count: int, g: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch's tokens; every fourth has no advantage."""
    logp = -torch.rand(count, generator=g) * 3.0
    noise = torch.randn(9, count, generator=g)
    advantage = torch.where(torch.arange(count) % 4 == 0, 0.0, noise[0])
    weight = torch.full((count,), 1.0 / count)
    found = {
        "advantage": advantage,
        "weight": weight,
        "logp": logp,
        "entropy": noise[1].abs(),
        "unit_polarity": -0.2 * logp.exp() + 0.1 * noise[2],
        "position": torch.arange(count).float(),
    }
    for i, kind in enumerate(("sgd", "adam")):
        true = advantage * weight * (found["unit_polarity"] + 0.2 * noise[3 + i])
        found[f"true {kind}"] = true
        found[f"shared {kind}"] = true + 0.1 * advantage * weight * noise[5 + i]
        found[f"measured {kind}"] = 1e-3 * (advantage * found["unit_polarity"] + noise[7 + i])
    return found


def own(number: int, g: torch.Generator) -> dict[str, Any]:
    """A token whose entropy others' updates change three times as much as its own."""
    a, c, others = _normal(g), 0.1 * _normal(g), 3e-4 * _normal(g)
    mine = 1e-3 * a * c
    return {
        "batch": number,
        "kind": "sgd" if torch.rand((), generator=g) < 0.5 else "adam",
        "advantage": a,
        "weight": 0.01,
        "logp": -1.0,
        "entropy": 1.0,
        "unit_polarity": c,
        "own": mine,
        "total": mine + others,
        "measured": mine + others + 1e-5,
    }


def run(steps: int, g: torch.Generator) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl whose changes fade; the first step has no prediction of first order."""
    rows = []
    for step in range(steps):
        change = -0.1 * 0.93**step + 0.01 * _normal(g)
        rows.append(
            {
                "step": step,
                "entropy/mean": 2.4 * 0.95**step,
                "entropy/measured_delta": change,
                "entropy/predicted_delta": change + 0.002 * _normal(g) if step else None,
                "entropy/predicted_delta_polarity": 40.0 * (change + 0.02 * _normal(g)),
                "entropy/predicted_delta_instant": 3e5 * (change + 0.05 * _normal(g)),
                "time/step": 8.0,
                "time/stats": 0.6,
            }
        )
    return rows
