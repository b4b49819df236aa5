"""The images under docs/images, drawn from scripts: ``python -m docs.drawings`` draws all again.

They need the standard library alone, and the same sources give the same bytes everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path

from . import (
    asymmetry,
    cluster_pipeline,
    cpu_kernels,
    entropy,
    five_sums,
    gpu_kernels,
    predicted_runs,
    prediction_ranks,
    prediction_scatter,
)

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"


def draw_all() -> dict[str, str]:
    """Every image as its file name and its SVG."""
    results = ROOT / "benchmarks" / "results"
    return {
        "cpu-kernels.svg": cpu_kernels.draw(results / "cpu-2026-11-24.json"),
        "gpu-kernels.svg": gpu_kernels.draw(
            results / "gpu-check-h200-2026-11-28-peers.json",
            results / "gpu-check-h200-2026-11-28-last.json",
        ),
        "five-sums.svg": five_sums.draw(),
        "cluster-pipeline.svg": cluster_pipeline.draw(),
        "entropy.svg": entropy.draw(sorted(results.glob("main-job-*.json"))),
        **evidence(),
    }


def evidence() -> dict[str, str]:
    """The images of docs/evidence.md whose figures the newest summary of the validity study has."""
    paths = sorted((ROOT / "experiments" / "results").glob("validity-*.json"))
    if not paths:
        return {}
    summary, source = json.loads(paths[-1].read_text()), str(paths[-1].relative_to(ROOT))
    images = {
        "evidence-scatter.svg": ("isolated", prediction_scatter),
        "evidence-ranks.svg": ("isolated", prediction_ranks),
        "evidence-asymmetry.svg": ("asymmetry", asymmetry),
        "evidence-runs.svg": ("runs", predicted_runs),
    }
    return {
        name: script.draw(summary, source)
        for name, (part, script) in images.items()
        if summary[part]
    }
