"""In the place of the `deepspeed` command in a rehearsal: a run's figures and trace, in no time."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.training_job import TRACE


def main(arguments: list[str]) -> None:
    options = dict(text.split("=", 1) for text in arguments if "=" in text)
    folder = Path(options["output_dir"])
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        print(json.dumps({"step": 0, "eval/accuracy": 0.25}), file=file)
        for step in range(1, int(options["steps"]) + 1):
            print(json.dumps(figures(step)), file=file)
    if TRACE in os.environ:
        Path(os.environ[TRACE]).write_text(json.dumps({"traceEvents": events()}))


def figures(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "reward/accuracy": 0.5,
        "entropy/mean": 1.25,
        "response/length": 8.0,
        "time/rollout": 2.0,
        "time/stats": 0.5,
        "time/train": 1.0,
        "time/step": 4.0,
        "throughput/tokens_per_second": 64.0,
        "memory/peak_device": 1.5,
    }


def events() -> list[dict[str, Any]]:
    """An update of 10 ms with three kernels: in the head, in the optimizer, and elsewhere."""
    host = {"ph": "X", "pid": 1, "tid": 1}
    found = [
        {**host, "cat": "user_annotation", "name": name, "ts": ts, "dur": dur}
        for name, ts, dur in (
            ("papo update", 0, 10_000),
            ("papo head, forward", 100, 100),
            ("papo optimizer step", 300, 100),
        )
    ]
    for i, (ts, dur) in enumerate(((150, 3000), (250, 5000), (350, 2000))):
        launch = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": ts, "dur": 5}
        found.append({**host, **launch, "args": {"correlation": i}})
        kernel = {"cat": "kernel", "name": f"kernel {i}", "ts": 1000 * i, "dur": dur}
        found.append({"ph": "X", "pid": 0, "tid": 7, **kernel, "args": {"correlation": i}})
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
