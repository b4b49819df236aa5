"""What campaigns share: arguments, rows that a later call goes on from, and a table at the end."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaigns import ranks
from tests.campaigns.ranks import Rank
from tests.distributed.launch import ROOT
from tests.distributed.runs import Tolerance, config, difference

Row = dict[str, Any]
TIMEOUT_SECONDS = 180.0  # of a run that takes five
LEAVE_SECONDS = 10.0


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The arguments of every campaign but for how many cases it has."""
    made = argparse.ArgumentParser(prog=f"python -m tests.campaigns.{name}", description=doc)
    made.add_argument("--seed", type=int, default=0, help="of all random choices (default 0)")
    made.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "campaigns" / f"{name}.jsonl",
        help="JSON Lines, a row per case; a case that has a row of this seed is not run again",
    )
    made.add_argument(
        "--fresh", action="store_true", help="start Python anew for every rank (10 to 15 s each)"
    )
    made.add_argument("--keep", type=Path, help="a folder for copies of the runs that failed")
    return made


class Ledger:
    """The rows of a campaign, each written as soon as its case is over.

    Attributes:
        rows: of this seed, those of earlier calls first.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._seed, self._began = path, seed, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.read_text().splitlines() if path.exists() else []
        self.rows: list[Row] = [row for row in map(json.loads, written) if row["seed"] == seed]

    def has(self, case: int | str) -> bool:
        """Whether a row of `case` is there."""
        return any(row["case"] == case for row in self.rows)

    def add(self, case: int | str, **columns: Any) -> None:
        """Write and show a row; `failure` is the text of what went wrong, empty where nothing
        did."""
        row = {"seed": self._seed, "case": case, **columns}
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = "  ".join(str(value) for name, value in columns.items() if name != "failure")
        failed = [f"FAILED: {row['failure']}"] if row["failure"] else []
        print(f"{case:>4}  {shown}", *failed, flush=True)

    def conclude(self, by: Sequence[str]) -> int:
        """Print how many cases of each kind (the columns `by`) had which outcome; the exit
        status."""
        outcomes = sorted({row["outcome"] for row in self.rows})
        kinds: dict[tuple[str, ...], Counter[str]] = {}
        for row in self.rows:
            kind = tuple(str(row[name]) for name in by)
            kinds.setdefault(kind, Counter())[row["outcome"]] += 1
        lines = [[*by, *outcomes]]
        lines += [[*kind, *(str(n[o]) for o in outcomes)] for kind, n in sorted(kinds.items())]
        total = Counter(row["outcome"] for row in self.rows)
        lines.append(["all", *[""] * (len(by) - 1), *(str(total[o]) for o in outcomes)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print()
        for line in lines:
            print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
        failed = [row for row in self.rows if row["failure"]]
        used = sum(os.times()[:4])
        print(
            f"{len(self.rows)} cases, {len(failed)} failed; rows in {self._path}; this call took "
            f"{(time.monotonic() - self._began) / 60:.1f} minutes and {used / 60:.1f} of CPU time"
        )
        for row in failed:
            print(f"  case {row['case']}: {row['failure']}")
        return 1 if failed or not self.rows else 0


class Ended(NamedTuple):
    """A start of train.py that is over.

    Attributes:
        codes: the exit status of every rank.
        out: what they printed to stdout, and `err` to stderr.
        misbehaved: what no start may do, whatever happened to it; empty where it did not.
    """

    codes: list[int | None]
    out: str
    err: str
    misbehaved: str

    @property
    def error_lines(self) -> list[str]:
        """Lines for the user about what ended the run."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    @property
    def refused(self) -> bool:
        """Every rank failed, and one line says why."""
        return len(self.error_lines) == 1 and all(code == 1 for code in self.codes)

    @property
    def summary(self) -> str:
        """Exit statuses, and the errors or else the last lines of stderr."""
        said = self.error_lines or self.err.strip().splitlines()[-2:]
        return f"exit status {self.codes}: {' | '.join(said)[:400]}"


def end(started: list[Rank], seconds: float = TIMEOUT_SECONDS) -> Ended:
    """Wait for the ranks of a case, and look for what none may do: hang, show a traceback, or leave
    processes behind."""
    in_time = ranks.ended(started, seconds)
    out, err = ("\n".join(getattr(rank, name) for rank in started) for name in ("out", "err"))
    left = ranks.left_behind(LEAVE_SECONDS)
    misbehaved = ""
    if not in_time:
        misbehaved = f"no end within {seconds:.0f} s: {(out + err)[-300:]!r}"
    elif "Traceback (most recent call last)" in out + err:
        misbehaved = f"a traceback that ends in {(out + err).strip().splitlines()[-1][:300]!r}"
    elif "unexpected" in err.lower():
        misbehaved = next(line for line in err.splitlines() if "unexpected" in line.lower())[:300]
    elif left:
        misbehaved = f"processes left behind: {left}"
    return Ended([rank.code for rank in started], out, err, misbehaved)


@contextmanager
def workshop(keep: Path | None = None) -> Iterator[tuple[Path, Callable[[Path, int | str], None]]]:
    """A folder to work in, removed at the end, and what saves a failed case's folder in `keep`."""

    def save(folder: Path, case: int | str) -> None:
        if keep is not None:
            shutil.copytree(folder, keep / f"case-{case}", symlinks=True, dirs_exist_ok=True)

    # No TemporaryDirectory: forked ranks would remove it when they end.
    folder = Path(tempfile.mkdtemp(prefix="papo-campaign-"))
    try:
        yield folder, save
    finally:
        shutil.rmtree(folder)


def tiny_model(folder: Path) -> Path:
    """The tests' tiny model in `folder`; it stays out of this process."""

    def build() -> str:
        from papo.model.quiet import quiet
        from tests.trainer.tiny import build_model

        with quiet():
            return str(build_model(folder / "model"))

    return Path(ranks.call(build))


def compare(a: Path, b: Path, tolerance: Tolerance | None = None) -> str:
    """`difference` of two runs, and what kept it from being told."""

    def differ() -> str:
        from papo.model.quiet import quiet

        try:
            with quiet():
                return difference(a, b, tolerance)
        except Exception as error:  # such as a file that the run did not write
            return f"{type(error).__name__}: {error}"

    return ranks.call(differ)


def campaign_config(folder: Path, model: Path, /, **sections: Any) -> Path:
    """`config` with rewards that half of the completions earn, so that each step changes the
    weights; `folder` is made."""
    folder.mkdir(parents=True, exist_ok=True)
    reward = {"verifier": "tests.distributed.verifiers:even_sum", "weights": None}
    return config(folder, model, **{"reward": reward, **sections})


def end_well(started: list[Rank]) -> None:
    """Wait for ranks that nothing befell.

    Raises:
        SystemExit: they failed, so that there is nothing to hold others against.
    """
    done = end(started)
    if done.misbehaved or any(done.codes):
        raise SystemExit(f"an unbroken run failed: {done.misbehaved or done.summary}\n{done.err}")
