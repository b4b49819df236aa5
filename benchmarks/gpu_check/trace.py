"""Where an update's GPU time went, from a trace of torch.profiler: every kernel belongs to the
innermost range that its launch lies in, on the launch's own thread."""

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
MOST_KERNELS = 12


class _Ranges:
    """The marked ranges of each thread, which do not overlap on one thread."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self._by_thread: dict[Any, list[tuple[float, float, str]]] = {}
        for event in events:
            if event.get("cat") == "user_annotation" and event["name"] in PARTS:
                span = event["ts"], event["ts"] + event["dur"], PARTS[event["name"]]
                self._by_thread.setdefault((event["pid"], event["tid"]), []).append(span)
        for spans in self._by_thread.values():
            spans.sort()

    def part_of(self, launch: dict[str, Any] | None) -> str:
        """The part that a launch belongs to."""
        if launch is None:
            return REST
        spans = self._by_thread.get((launch["pid"], launch["tid"]), [])
        i = bisect_right(spans, (launch["ts"], float("inf"), "")) - 1
        return spans[i][2] if i >= 0 and launch["ts"] <= spans[i][1] else REST


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
