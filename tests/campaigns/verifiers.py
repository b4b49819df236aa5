"""Train with each of the tests' evil verifiers: none may end the run, show a traceback, or leave a
process behind.

A verifier that cannot be loaded may be refused instead, in one line and before the first step.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.campaigns import campaign, ranks
from tests.campaigns.campaign import Ended, Ledger
from tests.trainer.evil_verifiers import EVIL

STEPS = 2


def judge(done: Ended) -> tuple[str, str]:
    """The outcome, and what is wrong with it."""
    if done.misbehaved:
        return "failed", done.misbehaved
    if not any(done.codes):
        return "trained", ""
    began = any(line.startswith("step ") for line in done.out.splitlines())
    if done.refused and not began and "reward.verifier" in done.error_lines[0]:
        return "refused", ""
    return "failed", f"the verifier ended the run: {done.summary}"


def run_case(verifier: str, folder: Path, model: Path, fresh: bool) -> Ended:
    """Train for a few steps, in `folder`, on the rewards of `verifier`."""
    path = campaign.campaign_config(
        folder,
        model,
        steps=STEPS,
        reward={"verifier": verifier, "workers": 1, "timeout_s": 1.0},
        rollout={"prompts_per_step": 2, "completions_per_prompt": 2, "max_new_tokens": 6},
        evaluation={"before": False, "after": False},
        checkpoint={"every": 0, "keep": 1},
        health={"max_bad_steps": 0},
    )
    mark = str(folder)
    started = ranks.start(1, ["--config", str(path)], folder, mark, fresh=fresh)
    return campaign.end(started, mark)


def main() -> int:
    """Run the verifiers that have no row yet."""
    parser = campaign.parser("verifiers", __doc__)
    parser.add_argument("--cases", type=int, help="the first so many (default all)")
    asked = parser.parse_args()
    ledger = Ledger(asked.out, asked.seed)
    ranks.import_all()
    with campaign.workshop(asked.keep) as (folder, save):
        model = campaign.tiny_model(folder)
        for verifier in EVIL[: asked.cases]:
            name = verifier if ":" in verifier else f"tests.trainer.evil_verifiers:{verifier}"
            if ledger.has(name):
                continue
            case = folder / name.replace(":", "-")
            done = run_case(name, case, model, asked.fresh)
            outcome, failure = judge(done)
            ledger.add(name, outcome=outcome, failure=failure)
            if failure:
                save(case, case.name)
            shutil.rmtree(case)
    return ledger.conclude(by=("case",))


if __name__ == "__main__":
    sys.exit(main())
