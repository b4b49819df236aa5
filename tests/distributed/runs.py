"""Runs of train.py on a tiny model: their config, what they leave, and whether two are the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import AutoModelForCausalLM

STEPS = 5
VERIFIERS = ["tests.distributed.verifiers:even_length", "exact"]
# What differs between two runs of the same thing: clocks, and memory.
CLOCKS = ("time/", "memory/", "throughput/")
_MISSING = "missing"


class Tolerance(NamedTuple):
    """How far a figure or a weight may be from another: the larger of the two bounds."""

    relative: float
    absolute: float


def config(folder: Path, model: Path, /, **sections: Any) -> Path:
    """Write a config of a tiny run into `folder` and return the file's path."""
    options: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "steps": STEPS,
        "model": {"path": str(model), "dtype": "bf16", "dropout": True},
        "data": {
            "source": "reasoning_gym",
            "dataset": "chain_sum",
            "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            "held_out_size": 4,
            "train_size": 40,
        },
        "reward": {"verifier": VERIFIERS, "weights": [1.0, 0.5], "workers": 1},
        "rollout": {"prompts_per_step": 4, "completions_per_prompt": 4, "max_new_tokens": 6},
        "phase": {"warmup_steps": 1},
        "optim": {"lr": 1e-3, "micro_batch_size": 4},
        "checkpoint": {"every": 1, "keep": 2},
        "metrics": {"tensorboard": False},
        "evaluation": {"samples": 2},
    }
    for name, values in sections.items():
        options[name] = (
            {**options[name], **values} if isinstance(values, dict) and name in options else values
        )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines that the run of `folder` wrote, without clocks."""
    read = [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in read]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that the run of `folder` ended with."""
    return AutoModelForCausalLM.from_pretrained(folder / "run" / "final").state_dict()


def difference(a: Path, b: Path, tolerance: Tolerance | None = None) -> str:
    """The first difference between two runs, empty where there is none.

    Args:
        a, b: the folders in which `config` was written.
        tolerance: of figures and weights; None compares bit for bit. Completions are the same.
    """
    for name, allowed in (("completions.jsonl", None), ("metrics.jsonl", tolerance)):
        found, expected = rows(a, name), rows(b, name)
        if len(found) != len(expected):
            return f"{name}: {len(found)} lines instead of {len(expected)}"
        for number, (row, other) in enumerate(zip(found, expected, strict=True), 1):
            for key in sorted(row.keys() | other.keys()):
                here, there = row.get(key, _MISSING), other.get(key, _MISSING)
                if not _close(here, there, allowed):
                    return f"{name}, line {number}: {key} is {here!r} instead of {there!r}"
    found, expected = weights(a), weights(b)
    if found.keys() != expected.keys():
        return f"weights of other names: {sorted(found.keys() ^ expected.keys())}"
    for name, value in found.items():
        if not _close_weights(value, expected[name], tolerance):
            largest = (value.double() - expected[name].double()).abs().max()
            return f"{name} differs by up to {largest:.3g}"
    return ""


def same_run(a: Path, b: Path) -> None:
    """The same figures, completions and weights, bit for bit."""
    assert difference(a, b) == ""


def _close(a: Any, b: Any, tolerance: Tolerance | None) -> bool:
    numbers = all(isinstance(x, (int, float)) for x in (a, b))
    if tolerance is None or not numbers:
        return bool(a == b)
    return math.isclose(a, b, rel_tol=tolerance.relative, abs_tol=tolerance.absolute)


def _close_weights(a: torch.Tensor, b: torch.Tensor, tolerance: Tolerance | None) -> bool:
    if tolerance is None:
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=tolerance.relative, atol=tolerance.absolute)
