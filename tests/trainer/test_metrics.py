"""Figures on disk: what is written, when it is replaced, what a resumed run drops; their names."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from papo.dist.collectives import sum_named
from papo.errors import PapoError
from papo.policy.advantage import ScoredGroup, score_groups
from papo.policy.update import TokenSums, Update, token_sums
from papo.policy.weighting import BranchSums
from papo.record.completions import CompletionsWriter, completion_rows
from papo.record.jsonl import JsonLines, read_rows
from papo.record.metric_names import METRICS, reference_page
from papo.record.metrics import MetricsWriter
from papo.record.telemetry import StageClock, rollout_metrics, update_metrics
from papo.types import Completion, Problem, Reward
from papo_kernels import policy_loss

ROOT = Path(__file__).parents[2]


def writer(folder: Path, **options: Any) -> MetricsWriter:
    return MetricsWriter(folder, **{"tensorboard": False, "enabled": True, **options})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


# ---- metrics.jsonl and TensorBoard --------------------------------------------------------------


def test_a_row_per_step_and_the_same_names_in_tensorboard(tmp_path: Path) -> None:
    metrics = writer(tmp_path, tensorboard=True)
    values = {name: float(i) for i, name in enumerate(METRICS)}
    metrics.write(1, values)
    metrics.write(2, {"reward/mean": 0.25})
    metrics.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, **values},
        {"step": 2, "reward/mean": 0.25},
    ]
    shown = scalars(tmp_path)
    assert set(shown) == set(METRICS)
    assert shown["reward/mean"] == [(1, values["reward/mean"]), (2, 0.25)]


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    """A killed process loses none of them: nothing waits in the process for `close`."""
    metrics = writer(tmp_path)
    metrics.write(1, {"reward/mean": 0.5})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "reward/mean": 0.5}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_and_the_file_stays_json(tmp_path: Path, value: float) -> None:
    writer(tmp_path).write(3, {"optim/grad_norm": value, "reward/mean": 1})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(line, parse_constant=refuse) == {
        "step": 3,
        "optim/grad_norm": None,
        "reward/mean": 1.0,
    }


@pytest.mark.parametrize("enabled", [True, False])
def test_an_undocumented_name_is_refused_on_every_rank(tmp_path: Path, enabled: bool) -> None:
    with pytest.raises(ValueError, match=r"METRICS, got \['reward/meen'\]"):
        writer(tmp_path, enabled=enabled).write(1, {"reward/meen": 1.0, "reward/mean": 1.0})
    assert not list(tmp_path.iterdir())


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = writer(tmp_path, enabled=False, tensorboard=True)
    metrics.write(1, {"reward/mean": 1.0})
    metrics.truncate_after(0)
    metrics.close()
    completions = CompletionsWriter(tmp_path, enabled=False)
    completions.write(1, [{"text": "a"}])
    completions.truncate_after(0)
    completions.close()
    assert not list(tmp_path.iterdir())


def test_a_row_of_the_same_step_and_names_is_replaced(tmp_path: Path) -> None:
    """An evaluation has a row of its own beside the step's; a resumed run measures it again."""
    for accuracy in (0.25, 0.5):
        metrics = writer(tmp_path)
        if accuracy == 0.25:
            metrics.write(2, {"reward/mean": 0.1})
        metrics.write(2, {"eval/accuracy": accuracy})
        metrics.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 2, "reward/mean": 0.1},
        {"step": 2, "eval/accuracy": 0.5},
    ]


@pytest.mark.parametrize(("step", "kept"), [(2, [1, 2]), (0, []), (-1, []), (9, [1, 2, 3])])
def test_a_resumed_run_drops_what_came_after_its_checkpoint(
    tmp_path: Path, step: int, kept: list[int]
) -> None:
    """Every step is there once, in the file and in TensorBoard, whatever was written before."""
    first = writer(tmp_path, tensorboard=True)
    rows = CompletionsWriter(tmp_path, enabled=True)
    for i in (1, 2, 3):
        first.write(i, {"reward/mean": i / 10})
        rows.write(i, [{"text": "a"}, {"text": "b"}])
    first.close()
    rows.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "reward/me')  # the process was killed here

    resumed, rows = writer(tmp_path, tensorboard=True), CompletionsWriter(tmp_path, enabled=True)
    resumed.truncate_after(step)
    rows.truncate_after(step)
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == kept
    assert [r["step"] for r in read_rows(tmp_path / "completions.jsonl")] == [
        i for i in kept for _ in range(2)
    ]
    again = max([step, 0]) + 1 if step < 3 else 4
    resumed.write(again, {"reward/mean": 0.9})
    resumed.close()
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == [*kept, again]
    shown = scalars(tmp_path)["reward/mean"]
    assert [s for s, _ in shown] == [*kept, again] and shown[-1][1] == pytest.approx(0.9)


def test_lines_that_are_no_rows_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n{"a": 2}\nnot json\n{"step": 2, "t": "\xff"}\n{"step": 3}')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    JsonLines(path).append([{"step": 4}])
    assert [row["step"] for row in read_rows(path)] == [1, 2, 4]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_text_may_hold_any_character(tmp_path: Path) -> None:
    """What a model samples may be a line separator to Python, though not to JSON Lines."""
    path = tmp_path / "rows.jsonl"
    texts = ["a\u2028b", "\u2029", "\x85", "\x0b\x1c", "\n\r\n", "é😀"]
    texts.insert(1, "half of a pair: \ud83d")
    JsonLines(path).append({"step": i, "text": text} for i, text in enumerate(texts))
    JsonLines(path).keep_up_to(5)
    assert [row["text"] for row in read_rows(path)] == texts[:6]


class FullDisk:
    """A file on a full disk; what could not be written fails again when it is closed."""

    def write(self, *args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = close = write


@pytest.mark.parametrize("kind", ["metrics", "completions", "tensorboard"])
def test_disk_full_is_one_line_that_says_what_to_do(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = writer(tmp_path, tensorboard=kind == "tensorboard")
    completions = CompletionsWriter(tmp_path, enabled=True)
    if kind == "tensorboard":
        disk = FullDisk()
        board = SimpleNamespace(add_scalar=lambda *a: None, flush=disk.flush, close=disk.close)
        monkeypatch.setattr(metrics, "_board", board)
    else:
        target = metrics if kind == "metrics" else completions
        monkeypatch.setattr(target._lines, "_file", FullDisk())
    with pytest.raises(
        PapoError, match=rf"cannot write .*{kind}.*: No space left.*; free"
    ) as caught:
        metrics.write(1, {"reward/mean": 1.0})
        completions.write(1, [{"text": "a"}])
    assert "\n" not in str(caught.value) and "output_dir" in str(caught.value)
    metrics.close()  # as the run's end does, where a second error would hide the first
    completions.close()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    lines = JsonLines(path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PapoError, match="No space left"):
        lines.keep_up_to(1)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


# ---- names --------------------------------------------------------------------------------------


def test_the_page_lists_every_name_and_is_current() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == reference_page(), "run: python -m papo.record.metric_names > docs/metrics.md"
    table = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert table == list(METRICS)


def update_of(sums: TokenSums, grad_norm: float = 0.5, **more: Any) -> Update:
    return Update(sums, BranchSums(*[1.0] * 11), grad_norm, 1e-3, **more)


def test_a_loss_of_zero_comes_with_what_tells_that_training_works() -> None:
    """On-policy with centered advantages the surrogate is 0 and its gradient is not: the metrics
    hold the surrogate, the gradient norm and the mean absolute advantage; the page explains.
    """
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.full((4,), 0.25)
    batch = SimpleNamespace(
        token_weight=weight, live=weight > 0, advantages=advantages, sampler_logp=torch.zeros(4)
    )
    out = policy_loss(logits, torch.arange(4), advantages, batch.token_weight)
    out.loss.backward()
    assert logits.grad is not None
    sums = TokenSums.of(sum_named(token_sums(out, batch, torch.zeros(4))))
    figures = update_metrics([update_of(sums, float(logits.grad.norm()))])
    assert figures["loss/policy"] == pytest.approx(0.0, abs=1e-7)
    assert figures["loss/advantage_abs"] == pytest.approx(0.75)
    assert figures["optim/grad_norm"] > 0.1
    assert set(figures) <= set(METRICS)
    page = (ROOT / "docs" / "metrics.md").read_text()
    heading, explanation = "## The loss is 0\n", page.split("## The loss is 0\n")[-1]
    assert heading in page
    for name in ("optim/grad_norm", "loss/advantage_abs", "reward/zero_spread_groups"):
        assert f"`{name}`" in explanation.split("\n## ")[0]


def scored(values: list[list[float]]) -> list[ScoredGroup]:
    """Groups of completions with these rewards, from index 5 on; the n-th completion is n tokens
    long.
    """
    n = len(values[0])
    completions = [
        Completion(
            Problem(g, ({"role": "user", "content": f"p{g}"},), f"a{g}", {}, (1,)),
            tuple(range(1 + i)),
            (0.0,) * (1 + i),
            i == n - 1,
            f"text {g} {i}",
        )
        for g in range(len(values))
        for i in range(n)
    ]
    flat = [
        Reward(v, "invalid" if math.isnan(v) else "timeout" if v < 0 else "ok")
        for row in values
        for v in row
    ]
    advantage = SimpleNamespace(normalize_std=True, overlong="none", overlong_buffer=0)
    return score_groups(completions, flat, range(5, 5 + len(values)), advantage, 8)


def test_rollout_figures_by_hand() -> None:
    """Zero-spread groups and masked rewards are counted; masked rows are left out of the
    mean.
    """
    sampled = scored([[1.0, 0.0, math.nan], [1.0, 1.0, 1.0], [-0.5, 0.0, 0.0]])
    figures = rollout_metrics(sampled, rounds=2, success=1.0)
    values = [1.0, 0.0, 1.0, 1.0, 1.0, -0.5, 0.0, 0.0]
    mean = sum(values) / 8
    assert figures == {
        "reward/mean": pytest.approx(mean),
        "reward/std": pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 8)),
        "reward/accuracy": 0.5,
        "reward/zero_spread_groups": pytest.approx(1 / 3),
        "reward/errors": 0,
        "reward/timeouts": 1,
        "reward/invalid": 1,
        "response/length": 2.0,
        "response/truncated": pytest.approx(1 / 3),
        "rollout/rounds": 2,
    }
    assert set(figures) <= set(METRICS)


@pytest.mark.parametrize(("success", "accuracy"), [(1.0, 0.0), (0.9, 0.75), (-1.0, 1.0)])
def test_accuracy_counts_rewards_from_the_threshold_on(success: float, accuracy: float) -> None:
    """A verifier that gives 0.9 for a right answer, and -1 for a wrong one."""
    sampled = scored([[0.9, 0.9, math.nan], [0.9, -1.0, math.nan]])
    figures = rollout_metrics(sampled, 1, success)
    assert figures["reward/accuracy"] == accuracy
    assert figures["reward/mean"] == pytest.approx(1.7 / 4)


def test_token_figures_are_means_over_the_tokens_of_all_updates() -> None:
    first = TokenSums(3, 0.5, 6.0, 3.0, 1.0, 0.0, 2.0, 0.3, 1.5, 0.0)
    second = TokenSums(1, -0.1, 1.0, 1.4, 0.0, 1.0, 0.0, 0.1, 2.5, 0.0)
    updates = [
        update_of(first, 0.7),
        update_of(second, math.nan, reason="gradient norm is nan"),
    ]
    figures = update_metrics(updates)
    assert figures["entropy/mean"] == pytest.approx(7 / 4)
    assert figures["loss/policy"] == pytest.approx(0.2)  # a mean over updates, not tokens
    assert figures["loss/advantage_abs"] == pytest.approx(1.0)
    assert figures["loss/ratio"] == pytest.approx(1.1)
    assert figures["loss/clip_low"] == figures["loss/clip_high"] == 0.25
    assert figures["loss/clip_dual"] == 0.5
    assert figures["loss/sampler_kl"] == pytest.approx(0.1)
    assert figures["optim/skipped"] == 1 and math.isnan(figures["optim/grad_norm"])


def test_the_samplers_kl_is_k3_over_the_tokens_that_train() -> None:
    logp, sampler = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, torch.nan])
    zero = torch.zeros(3)
    out = SimpleNamespace(
        logp=logp,
        entropy=zero,
        ratio=zero,
        clip_side=zero,
        unit_polarity=zero,
        loss=torch.tensor(0.0),
    )
    weight = torch.tensor([1.0, 1.0, 0.0])
    batch = SimpleNamespace(
        token_weight=weight, live=weight > 0, advantages=zero, sampler_logp=sampler
    )
    sums = TokenSums.of(sum_named(token_sums(out, batch, zero)))
    assert sums.tokens == 2
    gap = 0.5  # log policy - log sampler of the first token
    assert sums.sampler_kl == pytest.approx(math.exp(gap) - 1 - gap)


def test_stage_times_add_up_and_make_tokens_per_second() -> None:
    clock = StageClock()
    for _ in range(2):
        with clock("rollout"):
            pass
    with clock.entering("gather", contextlib.nullcontext("model")) as value:
        assert value == "model"
    figures = clock.metrics(scored([[1.0, 0.0]]))
    assert set(figures) == {
        "time/rollout",
        "time/gather",
        "time/step",
        "throughput/tokens_per_second",
    }
    assert figures["time/step"] >= figures["time/rollout"] + figures["time/gather"] >= 0
    assert figures["throughput/tokens_per_second"] == pytest.approx(3 / figures["time/step"])


def test_completion_rows_hold_what_was_sampled() -> None:
    rows = completion_rows(scored([[1.0, math.nan], [0.0, 0.0]]))
    assert [(r["group"], r["uid"], r["text"]) for r in rows] == [
        (5, 0, "text 0 0"),
        (5, 0, "text 0 1"),
        (6, 1, "text 1 0"),
        (6, 1, "text 1 1"),
    ]
    assert rows[1]["reward"] is None and rows[1]["status"] == "invalid"
    assert rows[0]["prompt"] == "p0" and rows[2]["answer"] == "a1"
    assert [r["length"] for r in rows] == [1, 2, 1, 2]
    json.dumps(rows, allow_nan=False)
    page = (ROOT / "docs" / "metrics.md").read_text().split("## Completions")[1]
    assert all(f"`{key}`" in page for key in ("step", *rows[0]))
