"""Kill runs at random moments, resume them to the end, and see that their figures are those of the
unbroken run. Some are interrupted by SIGTERM and SIGINT instead, which they may not fail on.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.campaigns import campaign, ranks
from tests.campaigns.campaign import Ended, Ledger
from tests.campaigns.ranks import Rank
from tests.distributed.runs import Tolerance

STEPS = 6
KILLS_IN_A_CASE = 2
# Between runs on other numbers of ranks, which sum in another order, in float32.
ROUNDING = Tolerance(relative=1e-4, absolute=1e-6)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PEER_SECONDS = 60.0  # in which a rank notices that another is gone
# From its start a process takes this long to reach our code, where it can mind a signal.
_LAUNCH_SECONDS = {True: 2.0, False: 0.1}  # fresh, forked


class Variant(NamedTuple):
    """A kind of run that is killed.

    Attributes:
        worlds: the numbers of ranks that it may be started and resumed on.
        weights: checkpoint.weights.
    """

    worlds: tuple[int, ...]
    weights: str

    @property
    def changes(self) -> bool:
        """Whether its number of ranks may change."""
        return len(self.worlds) > 1

    @property
    def name(self) -> str:
        numbers = " or ".join(map(str, self.worlds))
        return f"{numbers} rank{'' if self.worlds == (1,) else 's'}, {self.weights}"

    def config(self, folder: Path, model: Path) -> Path:
        """Its config, written into `folder`."""
        # Dropout's masks depend on the number of ranks; with a small eps AdamW makes whole steps of
        # gradients that are rounding alone.
        alike = {
            "model": {"dtype": "fp32", "dropout": False},
            "optim": {"lr": 1e-3, "eps": 1e-5, "micro_batch_size": 4},
        }
        return campaign.campaign_config(
            folder,
            model,
            steps=STEPS,
            checkpoint={"every": 1, "keep": 2, "weights": self.weights},
            **(alike if self.changes else {"model": {"dtype": "bf16"}}),
        )


WORLDS = ((1,), (2,), (1, 2))
VARIANTS = [Variant(worlds, weights) for weights in ("fp32", "bf16") for worlds in WORLDS]


class Strike(NamedTuple):
    """A signal and its moment.

    Attributes:
        line: the start of the line after which it comes; empty for the start of the process.
        delay_s: seconds after that.
        victim: which rank it strikes, None for all of them.
        group: whether it strikes what the rank has started too.
    """

    number: signal.Signals
    line: str
    delay_s: float
    victim: int | None
    group: bool

    @property
    def words(self) -> str:
        target = "all" if self.victim is None else f"rank {self.victim}"
        moment = "the first step" if self.line else "the start"
        group = " and its group" if self.group else ""
        return f"{self.number.name} to {target}{group} {self.delay_s:.2f} s after {moment}"


class Pace(NamedTuple):
    """How long the unbroken run took, in seconds: until signals are minded, all of it, and a
    step."""

    launch_s: float
    run_s: float
    step_s: float


class Unbroken(NamedTuple):
    """Runs that nothing strikes.

    Attributes:
        folders: with the config and the run, by a variant's numbers of ranks.
        paces: by the number of ranks, and whether they are started afresh.
    """

    folders: dict[tuple[int, ...], Path]
    paces: dict[tuple[int, bool], Pace]


def choose_strike(rng: Random, number: signal.Signals, world: int, pace: Pace) -> Strike:
    """Half of the moments are anywhere in the run, half behind its first step: most would else come
    before it, or after the last."""
    if rng.random() < 0.5:
        line, delay_s = "", rng.uniform(pace.launch_s, pace.run_s)
    else:
        line, delay_s = "step ", rng.uniform(0.0, STEPS / 2 * pace.step_s)
    victim = rng.choice([None, *range(world)]) if world > 1 else None
    return Strike(number, line, delay_s, victim, group=rng.random() < 0.5)


def strike(started: list[Rank], planned: Strike) -> bool:
    """Wait for the moment and strike; False where the run ended before."""

    def over() -> bool:
        return all(rank.poll() is not None for rank in started)

    if planned.line:
        ranks.until(lambda: started[0].has_printed(planned.line), campaign.TIMEOUT_SECONDS)
    moment = time.monotonic() + planned.delay_s
    ranks.until(lambda: over() or time.monotonic() > moment, planned.delay_s)
    struck = started if planned.victim is None else [started[planned.victim]]
    alive = [rank for rank in struck if rank.poll() is None]
    for rank in alive:
        rank.send(planned.number, group=planned.group)
    return bool(alive)


def complaint(done: Ended, planned: Strike) -> str:
    """What is wrong with how the ranks ended after a strike, empty where nothing is."""
    if done.misbehaved:
        return done.misbehaved
    training = any(line.startswith("step ") for line in done.out.splitlines())
    if planned.number != signal.SIGKILL and training:
        ends = f"{planned.number.name} is not the end of a step: {done.summary}"
        return ends if any(done.codes) else ""
    # Before the run is set up, a signal may do what it does to any process.
    left = [code for code in done.codes if code not in (-planned.number, 128 + planned.number)]
    if any(left) and (planned.victim is None or not set(left) <= {0, 1}):
        return f"a wrong exit status after {planned.number.name}: {done.summary}"
    if any(left) and len(done.error_lines) != 1:
        return f"no single line says that a rank is gone: {done.summary}"
    return ""


class Case:
    """A run in a folder of its own, struck and resumed until its end.

    Attributes:
        strikes: those that struck, in words.
        worlds: the number of ranks of every start.
    """

    def __init__(self, variant: Variant, folder: Path, model: Path, rng: Random) -> None:
        self._variant, self._rng, self._folder = variant, rng, folder
        self._path = variant.config(folder, model)
        self.strikes: list[str] = []
        self.worlds: list[int] = []

    def start(self, fresh: bool) -> list[Rank]:
        """Start or resume it."""
        self.worlds.append(self._rng.choice(self._variant.worlds))
        arguments = ["--config", str(self._path), "--resume", "auto"]
        return ranks.start(self.worlds[-1], arguments, self._folder, fresh=fresh)

    def suffer(self, number: signal.Signals, unbroken: Unbroken, fresh: bool) -> str:
        """Start it and strike; what is wrong with how it ended."""
        started = self.start(fresh)
        pace = unbroken.paces[self.worlds[-1], fresh]
        planned = choose_strike(self._rng, number, self.worlds[-1], pace)
        if strike(started, planned):
            self.strikes.append(planned.words)
            seconds = campaign.TIMEOUT_SECONDS if number != signal.SIGKILL else _PEER_SECONDS
            return complaint(campaign.end(started, seconds), planned)
        done = campaign.end(started)
        return done.misbehaved or ("" if not any(done.codes) else done.summary)

    def finish(self, unbroken: Unbroken, fresh: bool) -> str:
        """Resume it to its end; what is wrong with that, or with its figures."""
        done = campaign.end(self.start(fresh))
        if done.misbehaved or any(done.codes):
            return f"cannot be resumed: {done.misbehaved or done.summary}"
        tolerance = ROUNDING if self._variant.changes else None
        reference = unbroken.folders[self._variant.worlds]
        difference = campaign.compare(self._folder, reference, tolerance)
        return f"other figures: {difference}" if difference else ""


def run_unbroken(folder: Path, model: Path) -> Unbroken:
    """Train every kind of run to its end, in fresh and in forked processes.

    Raises:
        SystemExit: these differ, so that forked ranks prove nothing.
    """
    made = Unbroken({}, {})
    for worlds in WORLDS:
        folders = {fresh: folder / f"unbroken-{worlds}-{fresh}" for fresh in (True, False)}
        for fresh, place in folders.items():
            path = Variant(worlds, "fp32").config(place, model)
            made.paces[worlds[0], fresh] = run_to_end(path, worlds[0], fresh)
        difference = campaign.compare(folders[False], folders[True])
        if difference:
            raise SystemExit(f"forked ranks train other weights than fresh ones: {difference}")
        made.folders[worlds] = folders[True]
    return made


def run_to_end(path: Path, world: int, fresh: bool) -> Pace:
    """The pace of the run of the config at `path`."""
    began = time.monotonic()
    started = ranks.start(world, ["--config", str(path)], path.parent, fresh=fresh)
    ranks.until(lambda: started[0].has_printed("step 1/"), campaign.TIMEOUT_SECONDS)
    first = time.monotonic()
    ranks.until(lambda: started[0].has_printed(f"step {STEPS}/"), campaign.TIMEOUT_SECONDS)
    step_s = (time.monotonic() - first) / (STEPS - 1)
    campaign.end_well(started)
    return Pace(_LAUNCH_SECONDS[fresh], time.monotonic() - began, step_s)


def run_case(case: Case, numbers: list[signal.Signals], unbroken: Unbroken, fresh: bool) -> str:
    """Strike with each of the signals, then resume to the end; the first thing that is wrong."""
    for number in numbers:
        # A signal that a run minds may come while it imports, which a forked one does not.
        failure = case.suffer(number, unbroken, fresh or number != signal.SIGKILL)
        if failure:
            return failure
    return case.finish(unbroken, fresh)


def main() -> int:
    """Kill and interrupt runs until there are as many of both as asked for."""
    parser = campaign.parser("kill", __doc__)
    parser.add_argument("--kills", "--cases", type=int, default=20, help="SIGKILLs (default 20)")
    parser.add_argument(
        "--signals", type=int, default=10, help="runs with a SIGTERM or SIGINT (default 10)"
    )
    asked = parser.parse_args()
    ledger = Ledger(asked.out, asked.seed)
    ranks.prepare()
    with campaign.workshop(asked.keep) as (folder, save):
        model = campaign.tiny_model(folder)
        unbroken = run_unbroken(folder, model)

        def run(name: str, variant: Variant, numbers: list[signal.Signals]) -> None:
            rng = Random(f"{asked.seed}/{name}")
            case = Case(variant, folder / name, model, rng)
            failure = run_case(case, numbers, unbroken, asked.fresh)
            columns = {"run": variant.name, "ranks": case.worlds, "struck": case.strikes}
            outcome = "failed" if failure else "the same figures"
            ledger.add(name, **columns, outcome=outcome, failure=failure)
            if failure:
                save(folder / name, name)
            shutil.rmtree(folder / name)

        for index in range(asked.signals):
            name, number = f"interrupted-{index}", _SIGNALS[index % len(_SIGNALS)]
            if not ledger.has(name):
                run(name, VARIANTS[index % len(VARIANTS)], [number])
        kills, index = 0, 0
        while kills < asked.kills:
            name = f"killed-{index}"
            if not ledger.has(name):
                run(name, VARIANTS[index % len(VARIANTS)], [signal.SIGKILL] * KILLS_IN_A_CASE)
            kills += len(next(row for row in ledger.rows if row["case"] == name)["struck"])
            index += 1
    return ledger.conclude(by=("run",))


if __name__ == "__main__":
    sys.exit(main())
