"""What test_engine (one rank) and test_checkpoint (two) ask of `average_tasks`, and must hear."""

from __future__ import annotations

from typing import Any

import pytest

OFFLOAD = {"offload_optimizer": "cpu"}
ALONE = [(0, "fp32", {}), (1, "fp32", {}), (2, "bf16", OFFLOAD), (3, "bf16", OFFLOAD)]
TWO = [(0, "fp32", {}), (1, "bf16", {}), (2, "fp32", {}), (3, "fp32", {}), (3, "bf16", {})]


def asked(cases: list[tuple[int, str, dict[str, str]]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The cases as tasks, `average-0` and so on."""
    return {
        f"average-{i}": ("average", {"stage": stage, "dtype": dtype, **offload})
        for i, (stage, dtype, offload) in enumerate(cases)
    }


def check(got: dict[str, Any], stage: int, dtype: str) -> None:
    """One rank's answer.

    What folds may not touch is compared bit for bit. The gradients' reference is plain autograd in
    float64: bfloat16 activations cost 3 digits of them. Float32 masters round what an update adds.
    """
    off = 1e-6 if dtype == "fp32" else 1e-2
    assert got["nothing"] == [True, True]
    for name in ("kept", "followed", "without"):
        assert got[name] == [True] * 3, name
    assert got["average_off"] < off
    for norm, true in got["norms"]:
        assert norm == pytest.approx(true, rel=off)
    for told, true in got["first_orders"]:
        assert abs(true) > 1e-6 and told == pytest.approx(true, rel=1e-4, abs=5e-9)
    moved = ["compute", "master"] if (stage, dtype) == (0, "fp32") else ["compute"]
    for move in got["moves"]:
        assert move["restored"] and move["moved"] == moved
        assert move["along"] == pytest.approx(1, abs=1e-5 if dtype == "fp32" else 1e-3)
    # Along the batch's own gradient, before the first update.
    assert got["moves"][0]["entropy"] == pytest.approx(1, abs=0.02 if dtype == "fp32" else 0.2)
    assert got["spoiled"] and got["unspoiled"]
