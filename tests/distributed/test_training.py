"""Whole runs of train.py on a tiny model: killed and resumed, terminated, on two ranks, and refused
with one line.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from papo.dist.folders import completed
from papo.record.metric_names import METRICS, VERIFIER_MEAN, documented_as
from tests.distributed.launch import ROOT, environment, finish, free_port, start
from tests.distributed.runs import STEPS, VERIFIERS, config, rows, same_run, weights
from tests.trainer.tiny import build_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_model(folder)
    return folder


def train(path: Path, *arguments: str, world: int = 1, code: int = 0) -> list[tuple[int, str, str]]:
    results = finish(start(world, ["train.py", "--config", str(path), *arguments]))
    for got, out, err in results:
        assert got == code, f"exit code {got}\n{out}\n{err}"
    return results


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    train(config(folder, tiny))
    return folder


def test_a_run_leaves_what_it_promises(unbroken: Path, tiny: Path) -> None:
    run = unbroken / "run"
    names = {p.name for p in run.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "completions.jsonl",
        "summary.json",
        "curves.png",
        "final",
    } <= names
    steps = [r for r in rows(unbroken) if "reward/mean" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert all(r["optim/skipped"] == 0 and r["entropy/mean"] > 0 for r in steps)
    effects = ("entropy/predicted_delta", "entropy/measured_delta")
    assert all(r[name] is not None for r in steps for name in effects)
    assert any(abs(r["phase/phi"]) > 0 for r in steps)
    labels = [e["label"] for e in json.loads((run / "summary.json").read_text())["evaluations"]]
    assert labels == ["before", "after"]
    assert [step for step, _ in completed(run / "checkpoints")] == [STEPS - 1, STEPS]
    AutoTokenizer.from_pretrained(run / "final")
    before = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    after = weights(unbroken)
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[k].float(), before[k].float()) for k in after)


def test_every_documented_figure_is_written_and_no_other(unbroken: Path) -> None:
    lines = (unbroken / "run" / "metrics.jsonl").read_text().splitlines()
    written = {name for line in lines for name in json.loads(line)}
    # Stages and memory that this run, on a CPU and with one update per rollout, does not have.
    assert {documented_as(n) for n in written} == {"step", *METRICS} - {"memory/peak_device"}
    means = {n.removeprefix(VERIFIER_MEAN) for n in written if n.startswith(VERIFIER_MEAN)}
    assert means == set(VERIFIERS)


def test_each_step_shows_what_a_small_loss_does_not(unbroken: Path) -> None:
    """Two of four completions differ from the group's mean: there is something to learn, whatever
    the value of the loss.
    """
    for row in rows(unbroken):
        if "reward/mean" in row:
            learns = row["reward/zero_spread_groups"] < 1
            assert math.isfinite(row["loss/policy"])
            assert (row["loss/advantage_abs"] > 0) == (row["optim/grad_norm"] > 0) == learns
            assert abs(row["loss/policy"]) < row["loss/advantage_abs"] or not learns


def test_every_completion_once(unbroken: Path) -> None:
    completions = rows(unbroken, "completions.jsonl")
    assert len(completions) == STEPS * 4 * 4
    keys = [(r["step"], r["group"]) for r in completions]
    assert all(keys.count(key) == 4 for key in set(keys))


def kill_after(
    line_start: str, path: Path, *arguments: str, world: int, killed: int
) -> list[tuple[int, str, str]]:
    """SIGKILL to a rank while the step after the one that prints `line_start` is under way."""
    ranks = start(world, ["train.py", "--config", str(path), *arguments])
    assert ranks[0].stdout is not None
    for line in ranks[0].stdout:
        if line.startswith(line_start):
            ranks[killed].kill()
            break
    results = finish(ranks)
    assert results[killed][0] == -signal.SIGKILL
    return results


def same_but_for_rounding(a: Path, b: Path) -> None:
    """The same completions; figures within 1e-6 or a relative 1e-5, weights within 1e-5, a
    hundredth of what an update may change them by. Weights of float32 are meant.
    """
    assert rows(a, "completions.jsonl") == rows(b, "completions.jsonl")
    for row, expected in zip(rows(a), rows(b), strict=True):
        missing = {name for name, value in expected.items() if value is None}
        assert missing == {name for name, value in row.items() if value is None}
        got, wanted = ({k: v for k, v in r.items() if k not in missing} for r in (row, expected))
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    final = weights(b)
    for name, value in weights(a).items():
        torch.testing.assert_close(value, final[name], rtol=0, atol=1e-5)


def deepspeed(ranks: int, port: int, path: Path, **options: Any) -> subprocess.Popen[str]:
    """The run as users start it: by the `deepspeed` command."""
    command = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    inherited = {k: v for k, v in environment(0, ranks, port).items() if "RANK" not in k}
    return subprocess.Popen(
        [sys.executable, *command, "--master_port", str(port), "train.py", "--config", str(path)],
        env={
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def test_interrupted_killed_and_resumed_is_unbroken(
    tmp_path: Path, tiny: Path, unbroken: Path
) -> None:
    """Ctrl-C saves and leaves. It comes to the whole group of a `deepspeed` command that ignores
    it, as in `make train`: the command, its launcher, which signals the rank once more, the rank
    and its workers. And wherever in a step SIGKILL strikes, resuming reaches the same figures."""
    path = config(tmp_path, tiny, checkpoint={"every": 0})
    process = deepspeed(
        1, free_port(), path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            os.killpg(process.pid, signal.SIGINT)
            break
    ((_, out, err),) = finish([process])
    assert len([x for x in out.splitlines() if "go on from there with --resume auto" in x]) == 1
    assert "the step ends and is saved" in err
    assert "Traceback" not in out + err and "KeyboardInterrupt" not in out + err
    ((step, _),) = completed(tmp_path / "run" / "checkpoints")
    assert 1 <= step < STEPS
    auto = ("--resume", "auto")
    kill_after("step 3/", path, *auto, "--set", "checkpoint.every=1", world=1, killed=0)
    train(path, *auto)
    same_run(tmp_path, unbroken)


def two_rank_config(folder: Path, tiny: Path) -> Path:
    """Dynamic sampling, two updates per rollout, a KL term, kept ids, shared polarity: everything
    that makes ranks differ in what they do.

    Without dropout, which depends on the number of ranks, and in float32, in which rounding does
    not change what is drawn; with the default eps AdamW would move a weight whose gradient is
    rounding alone by the whole learning rate.
    """
    return config(
        folder,
        tiny,
        method="dapo",
        steps=4,
        model={"dtype": "fp32", "dropout": False},
        rollout={"top_p": 0.8},
        loss={"kl_coef": 0.05, "kl_estimator": "k3+", "ratio_level": "sequence"},
        weighting={"strength": 0.5, "shape": "tanh", "source": "rollout", "polarity": "shared"},
        optim={"lr": 1e-3, "eps": 1e-5, "micro_batch_size": 3, "updates_per_rollout": 2},
        dynamic_sampling={"max_rounds": 3},
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tiny) -> tuple[Path, list[tuple[int, str, str]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, train(two_rank_config(folder, tiny), world=2)


def test_two_ranks_evaluate_sample_and_train(two_ranks) -> None:
    folder, results = two_ranks
    assert "step 4/4" in results[0][1]
    assert "step" not in results[1][1]  # rank 0 alone speaks
    steps = [r for r in rows(folder) if "reward/mean" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    sampled = [r["rollout/rounds"] for r in steps]
    assert len(rows(folder, "completions.jsonl")) == sum(sampled) * 4 * 4
    assert all(r["optim/skipped"] == 0 for r in steps)
    # Over the whole vocabulary it would be some 0.2, which top_p cuts away from the sampler.
    assert all(abs(r["loss/sampler_kl"]) < 0.01 for r in steps)
    assert any(r["weighting/lambda_phi"] != 0 for r in steps)
    # Evaluated before the first training step, through the same gather.
    evaluations = json.loads((folder / "run" / "summary.json").read_text())["evaluations"]
    assert [(e["label"], e["step"], e["problems"]) for e in evaluations] == [
        ("before", 0, 4.0),
        ("after", 4, 4.0),
    ]
    AutoModelForCausalLM.from_pretrained(folder / "run" / "final")


def test_a_run_that_changes_its_number_of_ranks_is_that_of_two_ranks(
    tmp_path: Path, tiny: Path, two_ranks
) -> None:
    """The first step on one rank, the second on two, of which one is killed around the third, and
    the rest on one: the same completions and, but for rounding, the same figures and weights.

    The cursor depends on how often they sampled, and the reference is the initial model, not the
    resumed one.
    """
    path, auto = two_rank_config(tmp_path, tiny), ("--resume", "auto")
    train(path, "--set", "steps=1", "--set", "evaluation.after=false")
    left, (_, _, err) = kill_after("step 3/", path, *auto, world=2, killed=1)
    line = one_line([left])
    assert left[0] == 1 and line.startswith("error: rank 1 (pid ") and "is gone" in line
    assert "error" not in err
    train(path, *auto)
    same_but_for_rounding(tmp_path, two_ranks[0])


def test_strength_zero_is_the_baseline_bit_for_bit(tmp_path: Path, tiny: Path) -> None:
    """PAPO at lambda 0 and GRPO with PAPO's other options are the same run."""
    common = {
        "loss": {"aggregation": "token", "clip_low": 0.2, "clip_high": 0.2},
        "evaluation": {"before": False, "after": False},
        "steps": 2,
    }
    final = []
    for method in ("papo", "grpo"):
        folder = tmp_path / method
        folder.mkdir()
        train(config(folder, tiny, method=method, weighting={"strength": 0.0}, **common))
        final.append(weights(folder))
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def one_line(results: list[tuple[int, str, str]]) -> str:
    """The single line that rank 0 printed; the others are silent and fail too."""
    lines = [line for line in results[0][2].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in results[0][2]
    for code, out, err in results[1:]:
        assert code != 0 and "error:" not in err and not out
    return lines[0]


def test_batch_not_divisible_is_one_line_from_rank_0(tmp_path: Path, tiny: Path) -> None:
    path = config(tmp_path, tiny, rollout={"prompts_per_step": 3})
    line = one_line(train(path, world=2, code=1))
    assert "rollout.prompts_per_step=3" in line and "2 ranks" in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("weighting.strenght=0.5", ["weighting.strenght", "weighting.strength"]),
        ("model.path={empty}", ["tokenizer"]),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_from_rank_0(
    tmp_path: Path, tiny: Path, override: str, expected: list[str]
) -> None:
    """On two ranks, each of which meets it."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((tiny / "config.json").read_text())
    path = config(tmp_path, tiny)
    line = one_line(train(path, "--set", override.format(empty=empty), world=2, code=1))
    assert all(part in line for part in expected), line
