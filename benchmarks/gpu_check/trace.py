"""Where an update's GPU time went, from a trace of torch.profiler: a kernel belongs to the marked
range that its launch lies in."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from typing import Any

# Ranges that `profiled.py` marks, by the part of the update that they are.
UPDATE = "papo update"
PARTS = {
    "papo head, forward": "head, forward",
    "papo head, backward": "head, backward",
    "papo optimizer step": "optimizer step",
}
REST = "the rest of the model"
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
MOST_KERNELS = 30


class _Ranges:
    """The marked ranges. No two overlap, whatever their threads: a thread that asks for a backward
    pass waits for the one that makes it."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self._spans = sorted(
            (event["ts"], event["ts"] + event["dur"], PARTS[event["name"]])
            for event in events
            if event.get("cat") == "user_annotation" and event["name"] in PARTS
        )

    def part_of(self, launch: dict[str, Any] | None) -> str:
        """The part that a launch belongs to."""
        if launch is None:
            return REST
        i = bisect_right(self._spans, (launch["ts"], float("inf"), "")) - 1
        return self._spans[i][2] if i >= 0 and launch["ts"] <= self._spans[i][1] else REST


def digest(trace: dict[str, Any]) -> dict[str, Any]:
    """GPU milliseconds by part, the head's share, and the kernels that took longest in the head and
    in all; no shares where the trace has no kernels."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    ranges = _Ranges(events)
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    on_device = [event for event in events if event.get("cat") in _ON_DEVICE]
    parts: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    of_head: Counter[str] = Counter()
    unattributed = 0.0
    for event in on_device:
        launch = launches.get(event.get("args", {}).get("correlation"))
        part, ms = ranges.part_of(launch), event["dur"] / 1e3
        parts[part] += ms
        kernels[event["name"][:100]] += ms
        unattributed += ms if launch is None else 0.0
        if part.startswith("head"):
            of_head[event["name"][:100]] += ms
    total = sum(parts.values())
    head = sum(ms for part, ms in parts.items() if part.startswith("head"))
    wall = sum(e["dur"] for e in events if e["name"] == UPDATE and e["cat"] == "user_annotation")
    found: dict[str, Any] = {
        "GPU ms": total,
        "GPU ms by part": dict(parts),
        "GPU ms without a launch": unattributed,
        "host ms": wall / 1e3,
        "busy ms": _covered([(e["ts"], e["ts"] + e["dur"]) for e in on_device]) / 1e3,
        "kernels": len(on_device),
        "longest kernels, ms": dict(kernels.most_common(MOST_KERNELS)),
        "longest kernels of the head, ms": dict(of_head.most_common(MOST_KERNELS)),
    }
    if total:
        found["head's share of GPU time"] = head / total
    return found


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of what the spans cover together."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
