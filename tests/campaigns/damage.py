"""Damage the newest checkpoint of a run, resume, and see that nobody is told wrong figures.

A run goes on from `--resume auto` to the figures of the unbroken one; where every checkpoint is
damaged, it may end in one line instead.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.campaigns import campaign, ranks
from tests.campaigns.campaign import Ended, Ledger
from tests.campaigns.damages import Damage, all_damages, permit

STEPS = 4
OLDER, NEWEST = "step-00000002", "step-00000003"  # of a run that was killed in its last step


class Variant(NamedTuple):
    """A kind of run whose checkpoints are damaged."""

    world: int
    weights: str  # checkpoint.weights

    @property
    def name(self) -> str:
        return f"{self.world} rank{'s' if self.world > 1 else ''}, {self.weights}"

    def config(self, folder: Path, model: Path) -> Path:
        """Its config, written into `folder`."""
        checkpoint = {"every": 1, "keep": STEPS, "weights": self.weights}
        return campaign.campaign_config(folder, model, steps=STEPS, checkpoint=checkpoint)


VARIANTS = [Variant(world, weights) for world in (1, 2) for weights in ("fp32", "bf16")]


class Broken(NamedTuple):
    """A run that was killed in its last step, to be copied for each case.

    Attributes:
        folder: its config and run.
        unbroken: the folder of the same run without the kill.
    """

    variant: Variant
    model: Path
    folder: Path
    unbroken: Path


def break_run(variant: Variant, folder: Path, model: Path) -> Broken:
    """Train to the end, and take away what a run that was killed before has not written."""
    path = variant.config(folder, model)
    # Afresh: what forked ranks resume is held against what users start.
    started = ranks.start(variant.world, ["--config", str(path)], folder, fresh=True)
    campaign.end_well(started)
    broken = folder.with_name(f"{folder.name}-broken")
    shutil.copytree(folder, broken)
    for name in ("final", "summary.json", "curves.png"):
        gone = broken / "run" / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
    for checkpoint_folder in (broken / "run" / "checkpoints").iterdir():
        if checkpoint_folder.name not in (OLDER, NEWEST):
            shutil.rmtree(checkpoint_folder)
    return Broken(variant, model, broken, folder)


def choose(cases: int, seed: int, runs: list[Broken]) -> list[tuple[Broken, Damage]]:
    """Which damage befalls which run in each case: every one before any a second time."""
    rng, chosen = Random(seed), []
    while len(chosen) < cases:
        every = [
            (run, damage)
            for run in runs
            for damage in all_damages(run.folder / "run" / "checkpoints" / NEWEST)
        ]
        chosen += rng.sample(every, len(every))
    return chosen[:cases]


def judge(done: Ended, damage: Damage, existed: bool, run: Broken, case: Path) -> tuple[str, str]:
    """The outcome, and what is wrong with it."""
    if done.misbehaved:
        return "failed", done.misbehaved
    if done.refused:
        reason = f"refused beside an intact checkpoint: {done.error_lines[0]}"
        return ("failed", reason) if damage.spares_older else ("refused", "")
    if any(done.codes):
        return "failed", f"no single line says why: {done.summary}"
    difference = campaign.compare(case, run.unbroken)
    if difference:
        return "failed", f"other figures, exit status 0: {difference}"
    if existed and damage.spares_older and NEWEST not in done.out + done.err:
        return "failed", f"went on without a word about {NEWEST}"
    resumed = re.search(r"going on from \S*(step-\d+)", done.out)
    return f"resumed {resumed[1]}" if resumed else "started over", ""


def run_case(
    run: Broken, damage: Damage, rng: Random, folder: Path, fresh: bool
) -> tuple[str, str, str]:
    """Damage a copy of the run in `folder` and resume it: what was done, outcome and failure."""
    shutil.copytree(run.folder, folder)
    path = run.variant.config(folder, run.model)
    checkpoints = folder / "run" / "checkpoints"
    done = damage.apply(checkpoints / NEWEST, checkpoints / OLDER, rng)
    existed = (checkpoints / NEWEST).is_dir()
    arguments = ["--config", str(path), "--resume", "auto"]
    started = ranks.start(run.variant.world, arguments, folder, fresh=fresh)
    ended = campaign.end(started)
    permit(folder)
    return done, *judge(ended, damage, existed, run, folder)


def main() -> int:
    """Run the cases that have no row yet."""
    parser = campaign.parser("damage", __doc__)
    parser.add_argument("--cases", type=int, default=200, help="how many (default 200)")
    asked = parser.parse_args()
    ledger = Ledger(asked.out, asked.seed)
    ranks.prepare()
    with campaign.workshop(asked.keep) as (folder, save):
        model = campaign.tiny_model(folder)
        runs = [break_run(v, folder / v.name.replace(" ", ""), model) for v in VARIANTS]
        for number, (run, damage) in enumerate(choose(asked.cases, asked.seed, runs)):
            if ledger.has(number):
                continue
            case, rng = folder / f"case-{number}", Random(f"{asked.seed}/{number}")
            done, outcome, failure = run_case(run, damage, rng, case, asked.fresh)
            columns = {"run": run.variant.name, "damage": damage.kind, "done": done}
            ledger.add(number, **columns, outcome=outcome, failure=failure)
            if failure:
                save(case, number)
            shutil.rmtree(case)
    return ledger.conclude(by=("damage",))


if __name__ == "__main__":
    sys.exit(main())
