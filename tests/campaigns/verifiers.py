"""Train with each of the tests' evil verifiers: none may end the run, show a traceback, or leave a
process behind. One whose module cannot be imported is refused in one line, before the first step.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.campaigns import campaign, ranks
from tests.campaigns.campaign import Ended, Ledger
from tests.trainer.evil_verifiers import EVIL, EVIL_MODULES

STEPS = 2


def judge(done: Ended, loads: bool) -> tuple[str, str]:
    """The outcome, and what is wrong with it; `loads`: the verifier can be imported."""
    if done.misbehaved:
        return "failed", done.misbehaved
    if loads:
        ends = f"the verifier ended the run: {done.summary}"
        return ("failed", ends) if any(done.codes) else ("trained", "")
    began = any(line.startswith("step ") for line in done.out.splitlines())
    if done.refused and not began and "reward.verifier" in done.error_lines[0]:
        return "refused", ""
    return "failed", f"not refused in one line at the start: {done.summary}"


def run_case(verifier: str, folder: Path, model: Path, fresh: bool) -> Ended:
    """Train for a few steps, in `folder`, on the rewards of `verifier`."""
    path = campaign.campaign_config(
        folder,
        model,
        steps=STEPS,
        reward={
            "verifier": verifier,
            "weights": None,
            "workers": 1,
            "timeout_s": 1.0,
            "memory_mib": 1024,
        },
        rollout={"prompts_per_step": 2, "completions_per_prompt": 2},
        evaluation={"before": False, "after": False},
        checkpoint={"every": 0},
        health={"max_bad_steps": 0},
    )
    started = ranks.start(1, ["--config", str(path)], folder, fresh=fresh, cwd=folder)
    return campaign.end(started)


def main() -> int:
    """Run the verifiers that have no row yet."""
    parser = campaign.parser("verifiers", __doc__)
    parser.add_argument("--cases", type=int, help="the first so many (default all)")
    asked = parser.parse_args()
    ledger = Ledger(asked.out, asked.seed)
    ranks.prepare()
    names = [f"tests.trainer.evil_verifiers:{name}" for name in EVIL]
    names += [f"{name}:f" for name in EVIL_MODULES]
    with campaign.workshop(asked.keep) as (folder, save):
        model = campaign.tiny_model(folder)
        for name in names[: asked.cases]:
            if ledger.has(name):
                continue
            module, _, _ = name.partition(":")
            case = folder / name.replace(":", "-")
            case.mkdir()
            if module in EVIL_MODULES:
                (case / f"{module}.py").write_text(EVIL_MODULES[module][0])
            done = run_case(name, case, model, asked.fresh)
            outcome, failure = judge(done, loads=module not in EVIL_MODULES)
            ledger.add(name, outcome=outcome, failure=failure)
            if failure:
                save(case, case.name)
            shutil.rmtree(case)
    return ledger.conclude(by=("case",))


if __name__ == "__main__":
    sys.exit(main())
