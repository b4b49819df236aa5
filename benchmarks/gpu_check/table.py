"""The compact table that is printed last: what a reader of the last screen must know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MOST = 11_500  # characters of the whole
WIDTH = 150  # of a line
BEST = 10  # candidates of a sweep


def text(record: dict[str, Any]) -> str:
    """The record in at most `MOST` characters. Where that is too little, the longest sections lose
    lines from their ends."""
    sections = [[line[:WIDTH] for line in section] for section in _sections(record)]
    sections = [section for section in sections if section]

    def joined() -> str:
        return "\n\n".join("\n".join(section) for section in sections) + "\n"

    while len(joined()) > MOST:
        longest = max(sections, key=lambda section: sum(map(len, section)))
        del longest[-2:]
        longest.append("...")
    return joined()


def _sections(record: dict[str, Any]) -> Iterator[list[str]]:
    stages = record["stages"]
    yield list(_environment(record))
    yield list(_probe(stages))
    yield list(_smoke(stages))
    yield list(_timing(stages))
    yield list(_sweeps(stages))
    yield list(_counters(stages))
    yield list(_linear(stages))
    yield list(_peers(stages))
    yield list(_training(stages))
    yield list(_tests(stages))
    yield list(_outcomes(stages))


def _results(stages: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rest of the name, and the notes, of every stage of a kind that left some."""
    for name, stage in stages.items():
        if name.startswith(prefix) and "result" in stage:
            yield name.removeprefix(prefix).lstrip("-"), stage["result"]


def _environment(record: dict[str, Any]) -> Iterator[str]:
    found = record.get("environment", {})
    names = ("gpu", "driver", "nvcc", "torch", "triton", "python", "commit", "date")
    yield ", ".join(f"{name} {found[name]}" for name in names if name in found)
    for what, lines in record.get("errors", {}).items():
        yield f"{what}: {lines[-1]}"


def _probe(stages: dict[str, Any]) -> Iterator[str]:
    for _, found in _results(stages, "probe"):
        for name, unit in (("copy", "GB/s"), ("product", "TFLOP/s")):
            if unit in found.get(name, {}):
                yield f"{name} {found[name][unit]:.0f} {unit} at {found[name]['SM MHz']:.0f} MHz"
        for name in ("wide products", "active clusters"):
            yield f"{name}: " + ", ".join(f"{k} {v}" for k, v in found.get(name, {}).items())
    for _, found in _results(stages, "build"):
        for variant in ("normal", "smoke"):
            kernels = found.get(variant, {}).get("kernels", [])
            if kernels:
                spilling = sum(bool(kernel["spills"]) for kernel in kernels)
                most = max(kernel["registers"] for kernel in kernels)
                yield f"build {variant}: {len(kernels)} kernels, {most} registers, {spilling} spill"


def _smoke(stages: dict[str, Any]) -> Iterator[str]:
    for name, found in _results(stages, "smoke"):
        cases = found.get("cases", {})
        bad = {case: line for case, line in cases.items() if not line.startswith("ok")}
        under_way = f", stopped in {found['now']}" if found.get("now") else ""
        yield f"smoke {name} ({found.get('variant')}): {len(cases) - len(bad)} ok{under_way}"
        yield from (f"  {case}: {line}" for case, line in list(bad.items())[:6])


def _timing(stages: dict[str, Any]) -> Iterator[str]:
    results = list(_results(stages, "timing"))
    if results:
        yield f"{'ms, GB/s, of copy, cycles/row':<34}" + "".join(f"{f:>34}" for f, _ in results)
    for shape in dict.fromkeys(name for _, found in results for name in found.get("shapes", {})):
        for case in ("copy", "stats", "loss"):
            cells = (
                _timed(found.get("shapes", {}).get(shape, {}).get(case)) for _, found in results
            )
            yield f"{shape} {case}".ljust(34) + "".join(f"{cell:>34}" for cell in cells)


def _timed(figure: dict[str, Any] | None) -> str:
    if not figure:
        return "-"
    if "failed" in figure:
        return figure["failed"][:32]
    more = f"{figure['GB/s']:6.0f} {figure['of copy rate']:5.2f}" if "GB/s" in figure else ""
    return f"{figure['ms']:8.4f} {more} {figure['cycles/row']:7.0f}"


def _sweeps(stages: dict[str, Any]) -> Iterator[str]:
    for _, found in _results(stages, "sweep"):
        for task, entry in found.get("tasks", {}).items():
            tried = entry["tried"]
            errors = sum("error" in result for result in tried.values())
            yield f"{task}: {len(tried)} tried, {errors} of them not valid"
            best = [f"{name} {ms:.4f}" for name, ms in entry.get("ranking", [])[:BEST]]
            half = BEST // 2
            yield from ("  " + " | ".join(part) for part in (best[:half], best[half:]) if part)


def _counters(stages: dict[str, Any]) -> Iterator[str]:
    for name, found in _results(stages, "ncu"):
        if "skipped" in found:
            yield f"ncu {name}: skipped: {found['skipped']}"
        if summary := found.get("summary"):
            read, written = summary["MB read"], summary["MB written"]
            model_read = summary["MB read by the model"]
            model_written = summary["MB written by the model"]
            yield (
                f"ncu {name}: read {read:.1f} MB (model {model_read:.1f}), wrote {written:.1f} "
                f"({model_written:.1f}), {summary['GB/s']:.0f} GB/s, {summary['ms']:.4f} ms"
            )


def _linear(stages: dict[str, Any]) -> Iterator[str]:
    for _, found in _results(stages, "linear"):
        for shape, figures in found.get("shapes", {}).items():
            yield shape
            cells = [f"{name} {_rate(figure)}" for name, figure in figures.items()]
            yield from ("  " + " | ".join(cells[i : i + 3]) for i in range(0, len(cells), 3))


def _rate(figure: dict[str, Any]) -> str:
    if "failed" in figure:
        return figure["failed"][:40]
    rates = [f"{figure[unit]:.0f} {unit}" for unit in ("TFLOP/s", "GB/s") if unit in figure]
    return f"{figure['ms']:.3f} ms, {', '.join(rates)}"


def _peers(stages: dict[str, Any]) -> Iterator[str]:
    for _, found in _results(stages, "peers"):
        for shape, result in found.get("results", {}).items():
            cells = [f"{name} {figure['ms']:.3f}" for name, figure in result["figures"].items()]
            cells += [f"{name}: {why[:40]}" for name, why in result["failures"].items()]
            yield f"{shape}, ms"
            yield from ("  " + " | ".join(cells[i : i + 3]) for i in range(0, len(cells), 3))
        if overhead := found.get("host overhead, us"):
            yield "host us: " + ", ".join(f"{name} {us:.1f}" for name, us in overhead.items())
        if absent := found.get("unavailable"):
            yield "peers not measured: " + "; ".join(f"{k}: {v}" for k, v in absent.items())


def _training(stages: dict[str, Any]) -> Iterator[str]:
    for job, found in _results(stages, "training"):
        if medians := found.get("medians"):
            times = [f"{n[5:]} {s:.3f}" for n, s in medians.items() if n.startswith("time/")]
            speed = f"{medians['throughput/tokens_per_second']:.0f} tokens/s"
            memory = f"peak {found['peak GiB']:.1f} GiB, " if "peak GiB" in found else ""
            yield f"training {job}, median of {medians['steps']} steps: {speed}, {memory}seconds:"
            yield "  " + ", ".join(times)
        scores = [
            f"step {e['step']} {e['eval/accuracy']:.3f}"
            for e in found.get("evaluations", ())
            if "eval/accuracy" in e
        ]
        if scores:
            yield f"  held-out accuracy: {', '.join(scores)}"
        if update := found.get("update"):
            share = update.get("head's share of GPU time")
            whole = "no kernel was traced" if share is None else f"head {share:.1%} of GPU time"
            parts = [f"{part} {ms:.1f}" for part, ms in update["GPU ms by part"].items()]
            yield f"  update: {whole}; GPU ms: {', '.join(parts)}; host {update['host ms']:.1f} ms"


def _tests(stages: dict[str, Any]) -> Iterator[str]:
    for name, stage in stages.items():
        lines = stage.get("failures", [])
        yield from (f"{name}: {line}" for line in lines[:8])
        if len(lines) > 8:
            yield f"{name}: and {len(lines) - 8} more"
        if under_way := stage.get("under way"):
            yield f"{name}: under way when it ended: {', '.join(under_way[:4])}"


def _outcomes(stages: dict[str, Any]) -> Iterator[str]:
    words = []
    for name, stage in stages.items():
        if "skipped" in stage:
            words.append(f"{name} skipped ({stage['skipped']})")
        elif stage["ok"]:
            words.append(f"{name} ok {stage['seconds']:.0f} s")
        else:
            words.append(f"{name} FAILED ({stage['exit']}) {stage['seconds']:.0f} s")
    yield from _wrapped(words)


def _wrapped(words: list[str]) -> Iterator[str]:
    """Lines of as many words as fit."""
    line = ""
    for word in words:
        if line and len(f"{line} | {word}") > WIDTH:
            yield line
            line = ""
        line = f"{line} | {word}" if line else word
    if line:
        yield line
