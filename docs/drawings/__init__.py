"""The images under docs/images, drawn from scripts: ``python -m docs.drawings`` draws all again.

They need the standard library alone, and the same sources give the same bytes everywhere.
"""

from __future__ import annotations

from pathlib import Path

from . import cluster_pipeline, cpu_kernels, entropy, five_sums, gpu_kernels

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
    }
