"""When a run that has gone bad stops, what it says, and that it leaves no bad checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from papo.config import HealthConfig, TrainConfig
from papo.dist import checkpoint
from papo.errors import PapoError
from papo.policy.advantage import ScoredGroup
from papo.policy.batch import Batcher
from papo.policy.update import TokenSums, Update
from papo.policy.weighting import BranchSums
from papo.record.jsonl import read_rows
from papo.record.metric_names import METRICS
from papo.record.metrics import MetricsWriter
from papo.record.telemetry import rollout_metrics, update_metrics
from papo.train import loop
from papo.train.health import Health, last_good
from papo.train.loop import Loop
from papo.train.resume import Origin
from papo.train.state import RunState
from papo.types import Completion, Problem, Reward
from tests.distributed.saved import without_tensors
from tests.trainer.test_resume import config

NOTHING = TokenSums(*[0.0] * 10)
TOKENS = NOTHING._replace(tokens=4.0, entropy=2.0, ratio=4.0)


def update(sums: TokenSums = TOKENS, reason: str = "") -> Update:
    return Update(sums, BranchSums(*[1.0] * 11), 0.5, 1e-3, reason)


def group(*rewards: Reward) -> ScoredGroup:
    n = len(rewards)
    completion = Completion(Problem(0, (), "", {}, (1,)), (2,), (0.0,), False, "")
    zeros = (0.0,) * n
    return ScoredGroup(0, (completion,) * n, rewards, zeros, zeros, (True,) * n, True)


RIGHT, WRONG = Reward(1.0, "ok"), Reward(0.0, "ok")
ERROR, TIMEOUT, MASKED = Reward(0.0, "error"), Reward(0.0, "timeout"), Reward(math.nan, "invalid")


def engine(finite: bool = True) -> Any:
    return SimpleNamespace(finite=lambda: finite)


def health(
    limit: int = 3, folder: Path = Path("nowhere"), finite: bool = True, steps: int = 100
) -> Health:
    return Health(HealthConfig(max_bad_steps=limit), engine(finite), folder, steps)


def fault(
    made: Health, *updates: Update, rewards: tuple[Reward, ...] = (RIGHT, WRONG), **other: float
) -> str:
    """What a step with these updates and rewards is told; `other` figures replace its own."""
    done, sampled = updates or (update(),), [group(*rewards)]
    metrics = {**rollout_metrics(sampled, 1, 1.0), **update_metrics(done)}
    return made.fault(
        done, sampled, {**metrics, **{k.replace("_", "/"): v for k, v in other.items()}}
    )


SKIPPED = update(NOTHING, "no token to train on")
BAD_STEPS = {
    "skipped": ((SKIPPED,), (RIGHT, WRONG), "its update was skipped: no token to train on"),
    "all skipped": ((SKIPPED, SKIPPED), (RIGHT, WRONG), "its update was skipped"),
    "masked": ((SKIPPED,), (MASKED, MASKED), "its update was skipped"),
    "errors": ((update(),), (ERROR, ERROR), "no verifier gave one of its 2 completions a verdict"),
    "timeouts": ((update(),), (ERROR, TIMEOUT), "no verifier gave one of its 2 completions"),
}


@pytest.mark.parametrize("kind", BAD_STEPS)
def test_steps_in_a_row_that_teach_nothing_stop_the_run(kind: str) -> None:
    updates, rewards, reason = BAD_STEPS[kind]
    made = health(limit=3)
    assert [fault(made, *updates, rewards=rewards) for _ in range(2)] == ["", ""]
    told = fault(made, *updates, rewards=rewards)
    assert told.startswith("3 steps in a row taught nothing, the last because ") and reason in told


def test_a_step_that_teaches_something_begins_the_count_again() -> None:
    """So does one of several updates, or one verdict; masked is a verdict."""
    made = health(limit=2)
    for updates, rewards in (
        ([update()], (RIGHT, WRONG)),
        ([SKIPPED, update()], (RIGHT, WRONG)),
        ([update()], (ERROR, WRONG)),
        ([update()], (ERROR, MASKED)),
    ):
        assert fault(made, SKIPPED) == "" and made.bad_steps == 1
        assert fault(made, *updates, rewards=rewards) == "" and made.bad_steps == 0


def test_a_limit_of_0_never_stops_for_steps_but_for_what_is_not_finite() -> None:
    made = health(limit=0)
    assert {fault(made, SKIPPED) for _ in range(20)} == {""}
    assert fault(made, update(TOKENS._replace(entropy=math.nan))) == "entropy/mean is nan"


@pytest.mark.parametrize(
    ("sums", "figures", "told"),
    [
        ({"entropy": math.nan}, {}, "entropy/mean is nan"),
        ({"entropy": math.inf}, {}, "entropy/mean is inf"),
        ({"loss": math.nan}, {}, "loss/policy is nan"),
        ({}, {"reward_mean": math.inf}, "reward/mean is inf"),
    ],
)
def test_a_mean_of_something_that_is_not_finite_stops_at_once(
    sums: dict, figures: dict, told: str
) -> None:
    assert fault(health(), update(TOKENS._replace(**sums)), **figures) == told


def test_a_mean_of_nothing_is_no_reason_to_stop() -> None:
    assert fault(health(), SKIPPED, rewards=(MASKED, MASKED)) == ""


def test_weights_that_are_not_finite_stop_at_once() -> None:
    assert "not finite after the update" in fault(health(limit=0, finite=False))


def test_a_resumed_run_with_a_lower_limit_stops() -> None:
    """It begins with its checkpoint's count, which may be beyond the limit."""
    resumed = health(limit=2)
    resumed.bad_steps = 4
    assert fault(resumed, SKIPPED).startswith("5 steps in a row taught nothing, ")
    assert fault(resumed) == "" and resumed.bad_steps == 0


def test_the_line_has_the_last_good_checkpoint_and_how_to_go_on(tmp_path: Path) -> None:
    made = health(folder=tmp_path)
    made.stop(4, "")
    with pytest.raises(PapoError, match=r"^step 4: it is nan; there is no good checkpoint"):
        made.stop(4, "it is nan")
    for step, bad_steps in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 0)):
        without_tensors(tmp_path / f"step-{step:08d}", bad_steps=bad_steps)
    damaged = tmp_path / "step-00000005" / "trainer.json"
    damaged.write_text(json.dumps({"format": 1}))
    good = tmp_path / "step-00000002"
    assert last_good(tmp_path) == good
    with pytest.raises(PapoError) as caught:
        made.stop(5, "it is nan")
    told = str(caught.value)
    assert "\n" not in told and told.startswith("step 5: it is nan; ")
    assert told.endswith(f"--resume {good}")


def test_a_run_of_which_every_step_taught_nothing_is_bad_however_short_it_is() -> None:
    made = health(limit=10, steps=2)
    assert fault(made, SKIPPED) == ""
    assert fault(made, SKIPPED).startswith("2 steps in a row taught nothing")
    made = health(limit=10, steps=2)
    assert fault(made) == fault(made, SKIPPED) == ""
    made = health(limit=0, steps=1)
    assert fault(made, SKIPPED) == ""


def test_an_update_that_leaves_no_entropy_stops_the_run() -> None:
    """Its own entropy was that of the weights before."""
    for delta in (math.nan, math.inf):
        told = fault(health(), replace(update(), measured_delta=delta))
        assert told == "the entropy after the update is not finite"


def test_a_policy_that_cannot_be_computed_is_no_checkpoint(tmp_path: Path, monkeypatch) -> None:
    """Finite weights may be too large for that."""
    entropy = torch.zeros(1)
    broken: Any = SimpleNamespace(
        forward=lambda inputs: (entropy,) * 4, train=lambda mode: None, dropout=False
    )
    recorder: Any = SimpleNamespace(results=SimpleNamespace(evaluations=[]))
    written: list[int] = []
    monkeypatch.setattr(checkpoint, "save", lambda root, step, *rest: written.append(step))
    state = RunState(
        config(),
        Origin(None, {}, False, print),
        broken,
        Batcher(0, 0, torch.device("cpu")),
        {},
        {},
        health(folder=tmp_path),
        recorder,
    )
    state.save(1, 4)
    entropy.fill_(math.nan)
    with pytest.raises(PapoError, match=r"^step 2: the policy gives no token a probability"):
        state.save(2, 8)
    assert written == [1]


# ---- figures of nothing --------------------------------------------------------------------------


def test_a_mean_over_nothing_is_null_and_never_0(tmp_path: Path) -> None:
    """No completion has a reward, and so no token trains."""
    nothing = Update(NOTHING, BranchSums(*[0.0] * 11), 0.0, 1e-3)
    figures = {
        **rollout_metrics([group(MASKED, MASKED)], 1, success=1.0),
        **update_metrics([nothing]),
    }
    metrics = MetricsWriter(tmp_path, tensorboard=False, enabled=True)
    metrics.write(1, figures)
    metrics.close()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    null = {name for name, value in row.items() if value is None}
    assert null == {
        *("reward/mean", "reward/std", "reward/accuracy", "entropy/mean"),
        *(name for name in METRICS if name.startswith(("loss/", "polarity/"))),
    }
    assert row["reward/invalid"] == 2 and row["response/length"] == 1
    one = update(NOTHING._replace(tokens=2.0, loss=0.5))
    assert update_metrics([one, nothing])["loss/policy"] == 0.5


# ---- in the loop --------------------------------------------------------------------------------


class FakeSession:
    """A run's parts that do nothing but keep what they are given."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.saved: list[int] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.taught: list[float] = []
        self.health = Health(config.health, engine(), folder, config.steps)
        self.engine = SimpleNamespace(inference_model=lambda: contextlib.nullcontext("model"))
        self.progress = SimpleNamespace(start=lambda *a: None, close=lambda: None)
        self.state = SimpleNamespace(
            resume=lambda: (0, 0), save=lambda step, cursor: self.saved.append(step)
        )
        self.recorder = SimpleNamespace(
            say=lambda text: None,
            step=lambda step, metrics, sampled: self.rows.append((step, metrics)),
        )
        self.phase = SimpleNamespace(phase=0.0, metrics=dict, update=self.taught.append)
        self.weighting = SimpleNamespace(metrics=lambda phase: {}, update=lambda sums: None)
        self.prediction = SimpleNamespace(observe=lambda updates: {})
        self.row_check = SimpleNamespace(check=lambda sequences: None)
        self.problems = self.sampler = self.rewards = self.entropy_gradient = None


def run_of(
    steps: list[tuple[Update, tuple[Reward, ...]]], folder: Path, monkeypatch: Any
) -> tuple[FakeSession, str]:
    """A run whose steps are these, and the error that it ends with."""
    config = TrainConfig(
        name="test",
        steps=len(steps),
        output_dir=str(folder),
        model={"path": "somewhere"},
        data={"source": "reasoning_gym", "dataset": "chain_sum"},
        rollout={"prompts_per_step": 1, "completions_per_prompt": 2, "max_new_tokens": 8},
        checkpoint={"every": 1},
        health={"max_bad_steps": 2},
        evaluation={"before": False, "after": False},
    )
    session = FakeSession(config, folder)
    made = Loop.__new__(Loop)
    made.config, made.s, made.step, made.cursor = config, session, 0, 0
    made._termination = SimpleNamespace(reason="")

    def collected(*args: Any) -> SimpleNamespace:
        groups = [group(*steps[made.step][1])]
        return SimpleNamespace(groups=groups, sampled=groups, rounds=1)

    monkeypatch.setattr(loop.experience, "collect", collected)
    monkeypatch.setattr(made, "_updates", lambda *a: [steps[made.step][0]])
    with pytest.raises(PapoError) as caught:
        made.run()
    return session, str(caught.value)


GOOD = (update(), (RIGHT, WRONG))


def test_a_step_that_is_not_finite_is_recorded_and_neither_learned_from_nor_saved(
    tmp_path: Path, monkeypatch
) -> None:
    bad = (update(TOKENS._replace(entropy=math.nan)), (RIGHT, WRONG))
    session, told = run_of([GOOD, bad, GOOD], tmp_path, monkeypatch)
    assert told.startswith("step 2: entropy/mean is nan; ")
    assert session.saved == [1] and len(session.taught) == 1
    assert [step for step, _ in session.rows] == [1, 2]
    assert math.isnan(session.rows[1][1]["entropy/mean"])


def test_bad_steps_are_saved_until_the_run_stops(tmp_path: Path, monkeypatch) -> None:
    """The count in the checkpoint keeps them from taking a good one's place."""
    bad = (SKIPPED, (MASKED, MASKED))
    session, told = run_of([GOOD, bad, GOOD, bad, bad, GOOD], tmp_path, monkeypatch)
    assert told.startswith("step 5: 2 steps in a row taught nothing, the last because ")
    assert session.saved == [1, 2, 3, 4]
    means = ("reward/mean", "reward/accuracy", "loss/ratio", "loss/policy", "loss/sampler_kl")
    assert all(math.isnan(session.rows[1][1][name]) for name in means)
