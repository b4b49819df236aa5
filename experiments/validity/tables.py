"""The tables of docs/evidence.md, written between its markers from the newest summary.

A marker is a line ``<!-- table: NAME -->``; what stands between it and ``<!-- end -->`` is the
table's text, and is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.validity.names import SCORES
from papo.errors import PapoError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "evidence.md"
RESULTS = ROOT / "experiments" / "results"
KINDS = {"sgd": "SGD", "adam": "Adam", "sign": "sign", "adam-bf16": "Adam, bfloat16"}
TOKEN_KINDS = ("sgd", "adam")
TASKS = {"chain_sum": "chain_sum", "mawps": "MAWPS"}
FIRST_ORDER = {
    "own": "own tokens, all",
    "own quarter": "own tokens, a quarter",
    "own prompt": "own tokens, one prompt of four",
    "another": "one other batch",
    "others": "eight other batches",
    "averaged": "averaged: a quarter of each",
    "averaged prompts": "averaged: one prompt of each",
    "own, rounded": "own tokens, all; bfloat16 weights",
    "averaged, rounded": "averaged: a quarter of each; bfloat16 weights",
    "others, last 1 blocks": "others, last block",
    "others, last 4 blocks": "others, last 4 blocks",
    "others, last 8 blocks": "others, last 8 blocks",
    "others, last 15 blocks": "others, last 15 blocks",
    "others, every 16th": "others, every 16th parameter",
    "others, every 256th": "others, every 256th parameter",
}
RIVALS = ("covariance", "A·L")
GOAL, GOAL_TIME = 0.9, 0.1
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Summary = dict[str, Any]
Row = Sequence[str]


# ---- text ---------------------------------------------------------------------------------------


def figure(value: float | None, digits: int = 2) -> str:
    """With so many decimals; – for what there is none of."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def short(value: float | None) -> str:
    """Two digits; below 0.01 as a power of ten."""
    if value is None:
        return "–"
    small = 0.0 < abs(value) < 0.01
    mantissa, _, power = f"{value:{'.1e' if small else '.2g'}}".partition("e")
    raised = f" × 10{str(int(power)).translate(_RAISED)}" if power else ""
    return mantissa.replace("-", "−") + raised


def share(value: float | None) -> str:
    """Percent."""
    return "–" if value is None else f"{100 * value:.0f}%"


def with_signs(found: dict[str, Any] | None) -> str:
    """A correlation, its interval and the share of right signs; empty for what there is none of."""
    return f"{estimate(found)}, {share(found['right signs'])}" if found else ""


def estimate(found: dict[str, Any] | None) -> str:
    """A value and its interval."""
    if found is None or found["value"] is None:
        return "–"
    low, high = (figure(end) for end in found["interval"])
    return f"{figure(found['value'])} [{low}, {high}]"


def table(head: Row, rows: Iterable[Row]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- isolated steps -----------------------------------------------------------------------------


def _columns(summary: Summary) -> list[tuple[str, dict[str, Any]]]:
    """A title and the figures of each task and each of the two main kinds of step."""
    return [
        (f"{TASKS[task]}, {KINDS[kind]}", found["kinds"][kind])
        for task, found in summary["isolated"].items()
        for kind in TOKEN_KINDS
    ]


def answer(summary: Summary) -> str:
    """Polarity, what it competes with, and first order."""
    columns = _columns(summary)
    names = {
        "polarity": "polarity",
        **{name: SCORES[name] for name in RIVALS},
        "averaged": "first order, averaged gradient",
    }
    return table(
        ["Spearman [95%]", *(title for title, _ in columns)],
        [
            [label, *(estimate(found["predictors"][name]) for _, found in columns)]
            for name, label in names.items()
        ],
    )


def isolated(summary: Summary, task: str) -> str:
    """Every score, first order, and kind of step of a task; nothing without the task's batches."""
    if task not in summary["isolated"]:
        return ""
    kinds = summary["isolated"][task]["kinds"]
    head = [f"{TASKS[task]}: Spearman [95%], right signs"]
    head += [f"{KINDS[kind]} ({found['batches']})" for kind, found in kinds.items()]
    rows = [["*always falling*", *(share(found["falling"]) for found in kinds.values())]]
    names = ("own", "others", "averaged", "own, rounded", "averaged, rounded")
    first_order = {name: FIRST_ORDER[name] for name in names}
    for name, label in (SCORES | first_order).items():
        cells = [found["predictors"].get(name) for found in kinds.values()]
        label = f"first order: {label}" if name in first_order else label
        rows.append([label, *map(with_signs, cells)])
    return table(head, rows)


def differences(summary: Summary) -> str:
    """How much higher one correlation is than another, in the same samples."""
    columns = _columns(summary)
    labels = {**SCORES, "averaged": "first order, averaged", "own": "first order, own"}
    rows = []
    for pair in columns[0][1]["differences"]:
        first, _, second = pair.partition(" - ")
        cells = (estimate(found["differences"][pair]) for _, found in columns)
        rows.append([f"{labels[first]} less {labels[second]}", *cells])
    return table(["difference of Spearman's [95%]", *(title for title, _ in columns)], rows)


def _time_share(found: dict[str, Any], part: str) -> float:
    """Of a gradient of the mean entropy, over sampling and the policy gradient."""
    seconds: dict[str, float] = found["seconds"]
    return seconds[part] / (seconds["sampling"] + seconds["policy gradient"])


def _costs(found: dict[str, Any]) -> dict[str, float]:
    parts = {name: _time_share(found, name) for name in ("own", "own quarter", "own prompt")}
    return {**parts, "averaged": parts["own quarter"], "averaged prompts": parts["own prompt"]}


def first_order(summary: Summary) -> str:
    """Variants of the gradient: how near they are to the batch's own, and what they cost."""
    tasks = summary["isolated"]
    head = ["gradient of", *(f"cosine, {TASKS[task]}" for task in tasks)]
    columns = _columns(summary)
    head += [*(title for title, _ in columns), *(f"time, {TASKS[task]}" for task in tasks)]
    rows = []
    for name, label in FIRST_ORDER.items():
        if "rounded" in name:
            continue
        cosines = [found["cosine"].get(name, {}).get("median") for found in tasks.values()]
        cells = [figure(c) if c is not None else "" for c in cosines]
        cells += [estimate(found["predictors"][name]) for _, found in columns]
        costs = [_costs(found).get(name) for found in tasks.values()]
        rows.append([label, *cells, *(share(c) if c is not None else "" for c in costs)])
    return table(head, rows)


def goal(summary: Summary) -> str:
    """The goal that was set beforehand, predictor by predictor."""
    columns = [found["predictors"] for _, found in _columns(summary)]
    rows = []
    for name in (*SCORES, "own", "own quarter", "averaged", "averaged prompts"):
        lowest = min(found[name]["value"] for found in columns)
        above = all(
            found[name]["interval"][0] > max(found[rival]["interval"][1] for rival in RIVALS)
            for found in columns
        )
        costs = [_costs(found).get(name, 0.0) for found in summary["isolated"].values()]
        met = lowest >= GOAL and above and max(costs) <= GOAL_TIME
        label = f"first order: {FIRST_ORDER[name]}" if name in FIRST_ORDER else SCORES[name]
        facts = [figure(lowest), "yes" if above else "no", share(max(costs))]
        rows.append([label, *facts, "**yes**" if met else "no"])
    head = ["", "lowest Spearman", "above the intervals of covariance and A·L", "time", "goal met"]
    return table(head, rows)


def sizes(summary: Summary, task: str) -> str:
    """Step sizes of a task: second order, and the ranks; nothing without the task's batches."""
    if task not in summary["isolated"]:
        return ""
    rows = []
    for kind, of_kind in summary["isolated"][task]["sizes"].items():
        for size, found in of_kind.items():
            predictors = (estimate(found[name]) for name in ("polarity", "own", "averaged"))
            facts = (short(found["measured"]), share(found["second order"]))
            rows.append([f"{KINDS[kind]}, {short(float(size))}", *facts, *predictors])
    head = [f"{TASKS[task]}: step", "median change, nats", "second order"]
    return table([*head, "polarity", "first order, own", "first order, averaged"], rows)


# ---- tokens -------------------------------------------------------------------------------------

_TOKEN_SCORES = {
    **{name: SCORES[name] for name in list(SCORES)[:5]},
    "shared polarity": "shared polarity",
}


def tokens(summary: Summary) -> str:
    """Scores of tokens against their true effect on the batch's mean entropy."""
    columns = [
        (f"{TASKS[task]}, {KINDS[kind]}", found["kinds"][kind])
        for task, found in summary["tokens"].items()
        for kind in TOKEN_KINDS
    ]
    rows = [["*always falling*", *(share(found["falling"]) for _, found in columns)]]
    for name, label in _TOKEN_SCORES.items():
        cells = [found["scores"][name] for _, found in columns]
        rows.append([label, *map(with_signs, cells)])
    own = (estimate(found["own change"]) for _, found in columns)
    rows.append(["polarity, with the change of the token's own entropy", *own])
    return table(["Spearman [95%], right signs", *(title for title, _ in columns)], rows)


def deciles(summary: Summary) -> str:
    """Mean true effect by decile of a score, over the mean absolute effect of the deciles."""
    rows = []
    for task, of_task in summary["tokens"].items():
        for kind in TOKEN_KINDS:
            for name in ("polarity", "A·L", "shared polarity"):
                label = _TOKEN_SCORES[name]
                values = of_task["kinds"][kind]["scores"][name]["deciles"]
                size = sum(map(abs, values)) / len(values)
                cells = (figure(value / size, 1) for value in values)
                rows.append([f"{TASKS[task]}, {KINDS[kind]}: {label}", *cells])
    return table(["decile of the score", *(str(i) for i in range(1, 11))], rows)


def whose(summary: Summary) -> str:
    """Parts of the change of a token's entropy, and what polarity follows."""
    parts = ("own", "others", "second order")
    links = ("polarity with own", "polarity with measured", "total with measured")
    head = ["", "tokens", "its own update", "others' updates", "second order"]
    head += ["A·c with its own part", "A·c with the measured", "first order with the measured"]
    rows = []
    for task, of_task in summary["own"].items():
        for kind, found in of_task.items():
            cells = [str(found["tokens"]), *(share(found["shares"][part]) for part in parts)]
            cells += [estimate(found[link]) for link in links]
            rows.append([f"{TASKS[task]}, {KINDS[kind]}", *cells])
    return table(head, rows)


def asymmetry(summary: Summary) -> str:
    """Means by probability and sign of the advantage."""
    names = ("predicted", "own sgd", "own adam", "true sgd", "true adam")
    rows = []
    for task, found in summary["asymmetry"].items():
        edges = found["edges"]
        for sign, mark in (("positive", "A > 0"), ("negative", "A < 0")):
            for i, count in enumerate(found[sign]["tokens"]):
                means = [found[sign][name][i] for name in names]
                cells = [short(m["value"]) if m else "–" for m in means]
                between = f"{edges[i]:g} to {edges[i + 1]:g}"
                rows.append([f"{TASKS[task]}, {mark}, p {between}", str(count), *cells])
    head = ["", "tokens", "A·c", "own entropy, SGD", "own entropy, Adam"]
    return table([*head, "mean entropy, SGD", "mean entropy, Adam"], rows)


# ---- whole runs, the table of softmaxes, sources ------------------------------------------------


def runs(summary: Summary) -> str:
    """Means over the seeds."""
    rows = []
    for method, found in summary["runs"].items():
        run = f"{method}, seeds {', '.join(found['series'])}"
        steps = ", ".join(map(str, found["steps"]))
        for name, prediction in found["predictions"].items():
            cells = [estimate(prediction[s]) for s in ("levels", "differences", "detrended")]
            facts = [share(prediction["right signs"]), steps, share(found["time"])]
            rows.append([f"{run}: {name}", *cells, *facts])
    head = ["Spearman [95%]", "levels", "differences", "detrended", "right signs"]
    return table([*head, "steps", "time"], rows)


def tabular(summary: Summary) -> str:
    """Predicted over actual change by size of the step; nothing without that part."""
    found = summary["tabular"]
    if not found:
        return ""
    columns = zip(*(found[name] for name in ("sizes", "ratio", "remainder")), strict=True)
    rows = [[short(size), f"{ratio:.5f}", short(rest)] for size, ratio, rest in columns]
    slope = f"Slope of the remainder: {figure(found['slope'], 3)}."
    return table(["step", "predicted / actual", "remainder, nats"], rows) + "\n\n" + slope


def source(summary: Summary) -> str:
    """Machine, date and file."""
    machine = summary["environment"]
    batches = (
        f"{found['batches']} batches of {TASKS[task]} (median {found['tokens']:.0f} tokens)"
        for task, found in summary["isolated"].items()
    )
    return (
        f"{', '.join(batches)};\n{machine['cpu']}, torch {machine['torch']}, {summary['date']};\n"
        f"`experiments/results/validity-{summary['date']}.json`."
    )


TABLES: dict[str, Callable[[Summary], str]] = {
    "source": source,
    "answer": answer,
    "isolated chain_sum": lambda summary: isolated(summary, "chain_sum"),
    "isolated mawps": lambda summary: isolated(summary, "mawps"),
    "differences": differences,
    "sizes chain_sum": lambda summary: sizes(summary, "chain_sum"),
    "sizes mawps": lambda summary: sizes(summary, "mawps"),
    "first order": first_order,
    "goal": goal,
    "tokens": tokens,
    "deciles": deciles,
    "whose": whose,
    "asymmetry": asymmetry,
    "runs": runs,
    "tabular": tabular,
}


def filled(page: str, summary: Summary) -> str:
    """A page with its tables written anew.

    Raises:
        PapoError: a marker names no table.
    """

    def written(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise PapoError(f"table {name!r}: not one of {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n\n{TABLES[name](summary)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: ([^>]*?) -->\n.*?<!-- end -->", written, page, flags=re.S)


def newest(results: Path = RESULTS) -> Summary:
    """The newest summary.

    Raises:
        PapoError: there is none.
    """
    paths = sorted(results.glob("validity-*.json"))
    if not paths:
        raise PapoError(f"{results}: no validity-*.json; expected what `summary` writes")
    found: Summary = json.loads(paths[-1].read_text())
    return found


def main() -> None:
    """Write the tables of docs/evidence.md anew.

    Raises:
        PapoError: there is no summary, or a marker names no table.
    """
    PAGE.write_text(filled(PAGE.read_text(), newest()))
