"""The run's folder: what a run may write into, what moves aside, what a resumed run keeps."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from papo.config import CheckpointConfig, ModelConfig, TrainConfig
from papo.data.prompts import opens_thinking
from papo.dist import checkpoint, collectives
from papo.dist.folders import Retention, resolve
from papo.errors import PapoError
from papo.record import run_folder
from papo.record.lock import FolderLock
from papo.record.progress import Progress
from papo.record.recorder import Recorder
from papo.train import build
from papo.train.build import check_backend
from papo.train.health import Health
from papo.train.resume import Origin
from papo.train.session import Session
from papo.train.state import RunState
from tests.distributed.saved import without_tensors
from tests.trainer.tiny import CHAT_TEMPLATE, build_tokenizer


def config(folder: Path, resume: str = "never", steps: int = 3) -> TrainConfig:
    return TrainConfig(
        name="test",
        steps=steps,
        output_dir=str(folder),
        resume=resume,
        model={"path": "somewhere"},
        data={"source": "reasoning_gym", "dataset": "chain_sum"},
        rollout={"prompts_per_step": 4, "completions_per_prompt": 2, "max_new_tokens": 8},
        metrics={"tensorboard": False},
    )


def prepare(folder: Path, resume: str = "never", **options: Any) -> Path | None:
    """Make the folder ready; where an earlier run's is now."""
    resumed = resolve(resume, folder / "checkpoints")
    with contextlib.closing(FolderLock(folder)) as lock:
        return run_folder.prepare(lock, config(folder, resume, **options), resumed)


def finished_run(folder: Path, mark: str) -> Path:
    """What a run of two steps leaves; its newest checkpoint."""
    newest = folder / "checkpoints" / "step-00000002"
    without_tensors(newest)
    (folder / "metrics.jsonl").write_text(f'{{"step": 1, "mark": "{mark}"}}\n')
    return newest


def marks(root: Path) -> dict[str, str]:
    """Whose metrics each folder holds."""
    return {p.parent.name: json.loads(p.read_text())["mark"] for p in root.glob("*/metrics.jsonl")}


def test_a_new_run_gets_a_folder_with_its_resolved_options(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "deep" / "test"
    assert prepare(folder) is None
    assert yaml.safe_load((folder / "config.yaml").read_text())["steps"] == 3


def test_options_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    prepare(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PapoError, match="No space left on device"):
        prepare(tmp_path / "run", steps=4)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["steps"] == 3


def test_an_earlier_runs_folder_moves_aside_and_nothing_is_lost(tmp_path: Path) -> None:
    """Again and again: the first free number is taken, and the user is told."""
    for number, mark in enumerate("abc", start=1):
        finished_run(tmp_path / "run", mark)
        assert prepare(tmp_path / "run") == tmp_path / f"run.{number}"
        assert not (tmp_path / "run" / "checkpoints").exists()
    assert marks(tmp_path) == {"run.1": "a", "run.2": "b", "run.3": "c"}


def test_a_link_to_the_folder_stays_one(tmp_path: Path) -> None:
    """To another disk, perhaps, where the earlier run stays too."""
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    finished_run(tmp_path / "disk" / "run", "a")
    assert prepare(tmp_path / "link") == tmp_path / "disk" / "run.1"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link" / "config.yaml").is_file()
    assert marks(tmp_path / "disk") == {"run.1": "a"}


def test_a_folder_without_results_is_used_as_it_is(tmp_path: Path) -> None:
    """Such as the folder of a run that failed before its first step."""
    prepare(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert prepare(tmp_path / "run", steps=4) is None
    assert (tmp_path / "run" / "notes.txt").exists()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["steps"] == 4


def test_a_resumed_run_keeps_its_folder(tmp_path: Path) -> None:
    """By `auto`, and by the name of one of its own checkpoints, however it is spelled."""
    newest = finished_run(tmp_path / "run", "a")
    relative = os.path.relpath(newest)
    for resume in ("auto", str(newest), relative, f"{newest.parent}/../checkpoints/{newest.name}"):
        assert prepare(tmp_path / "run", resume) is None
    assert marks(tmp_path) == {"run": "a"}


def test_auto_without_a_checkpoint_keeps_what_is_there_and_starts(tmp_path: Path) -> None:
    """Killed before its first checkpoint: the rows go when the run begins again, see resume()."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "mark": "a"}\n')
    assert prepare(tmp_path / "run", "auto") is None
    assert marks(tmp_path) == {"run": "a"}


def test_going_on_from_another_runs_checkpoint_leaves_that_run_alone(tmp_path: Path) -> None:
    other = finished_run(tmp_path / "other", "b")
    finished_run(tmp_path / "run", "a")
    assert prepare(tmp_path / "run", str(other)) == tmp_path / "run.1"
    assert marks(tmp_path) == {"run.1": "a", "other": "b"}


@pytest.mark.parametrize("blocked", ["run", "run/config.yaml"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, blocked: str) -> None:
    if blocked == "run":  # a file is in its place
        (tmp_path / "run").write_text("")
    else:
        (tmp_path / blocked).mkdir(parents=True)
    with pytest.raises(PapoError, match="output_dir=") as caught, collectives.failing_together():
        prepare(tmp_path / "run")
    told = str(caught.value)
    assert "\n" not in told
    assert told.startswith(f"output_dir={str(tmp_path / 'run')!r}: ")
    assert told.endswith("choose another output_dir")


def test_what_a_run_writes_to_is_closed_with_it(tmp_path: Path) -> None:
    made = Session.__new__(Session)
    made.config, made.progress = config(tmp_path), Progress()
    made.origin, made._lock = Origin.of(None, False, print), FolderLock(tmp_path)
    with pytest.raises(PapoError, match="disk"), contextlib.ExitStack() as stack:
        made._open_recorder(stack)
        writers = made.recorder._metrics, made.recorder._completions
        writers[0].write(1, {"reward/mean": 1.0})
        writers[1].write(1, [{"text": "a"}])
        files = [writer._lines._file for writer in writers]
        assert not any(file.closed for file in files)
        raise PapoError("no disk")
    assert all(file.closed for file in files)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_the_second_run_in_a_folder_is_told_before_anything_else(
    tmp_path: Path, resume: str, monkeypatch
) -> None:
    """And what the first one has written stays where it is."""
    finished_run(tmp_path / "run", "a")
    monkeypatch.setattr(build, "check_backend", lambda name: pytest.fail("the run goes on"))
    with contextlib.closing(FolderLock(tmp_path / "run")):
        with pytest.raises(PapoError, match="another run is writing there"):
            Session(config(tmp_path / "run", resume))
        assert (tmp_path / "run" / ".lock").exists()
    assert marks(tmp_path) == {"run": "a"}


def test_a_folder_that_cannot_move_aside_is_refused_early(tmp_path: Path, monkeypatch) -> None:
    finished_run(tmp_path / "run", "a")
    monkeypatch.setattr(build, "check_backend", lambda name: pytest.fail("the run goes on"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PapoError, match=r"cannot move aside.* is not writable"):
        Session(config(tmp_path / "run"))


def test_a_run_that_would_lose_its_own_folder_is_refused_early(tmp_path: Path, monkeypatch) -> None:
    """Because it stands in it, goes on from a checkpoint in it, or cannot see its checkpoints."""
    run = tmp_path / "run"
    newest = finished_run(run, "a")
    without_tensors(newest, config=config(run).model_dump(mode="json"))
    copy = shutil.copytree(newest, run / "keep" / newest.name)
    monkeypatch.setattr(build, "check_backend", lambda name: pytest.fail("the run goes on"))
    with pytest.raises(PapoError, match=r"cannot move aside: resume=.* is in it, but not among"):
        Session(config(run, str(copy)))
    monkeypatch.chdir(run)
    with pytest.raises(PapoError, match="cannot move aside: the current folder is in it"):
        Session(config(Path(".")))
    (run / "checkpoints").rename(tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "not mounted")
    with pytest.raises(PapoError, match="checkpoints is no folder"):
        Session(config(run, "auto"))
    assert marks(tmp_path) == {"run": "a"}


def test_another_training_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch
) -> None:
    """By its checkpoint's word alone."""
    newest = finished_run(tmp_path / "run", "a")
    saved = config(tmp_path / "run").model_copy(update={"seed": 7}).model_dump(mode="json")
    without_tensors(newest, config=saved)
    monkeypatch.setattr(build, "check_backend", lambda name: pytest.fail("the run goes on"))
    with pytest.raises(PapoError, match=r"seed 7 -> 0; .*--resume-anyway"):
        Session(config(tmp_path / "run", "auto"))
    assert marks(tmp_path) == {"run": "a"}


def test_bad_references_stop_the_run_before_the_model_is_loaded(
    tmp_path: Path, tiny_model_path: Path, monkeypatch, capsys
) -> None:
    """Read in the workers, as completions will be; the run's folder is not made either."""
    path = tmp_path / "data.jsonl"
    answers = ["1,234", r"\$40", "27.0", "1e-05", "3 or 4"]
    path.write_text(
        "".join(json.dumps({"prompt": f"p{i}", "answer": a}) + "\n" for i, a in enumerate(answers))
    )
    made = TrainConfig(
        name="test",
        steps=1,
        output_dir=str(tmp_path / "run"),
        model={"path": str(tiny_model_path)},
        data={"source": "jsonl", "train_path": str(path), "held_out_size": 1},
        reward={"verifier": "exact", "extract": "last_number", "workers": 1},
        rollout={"prompts_per_step": 4, "completions_per_prompt": 2, "max_new_tokens": 8},
    )
    monkeypatch.setattr(build, "engines", lambda config: pytest.fail("the model is loaded"))
    with pytest.raises(PapoError, match=r"^1 of 5 reference answers would not score 1") as caught:
        Session(made)
    assert "'3 or 4': it holds 2 numbers" in str(caught.value)
    assert "3 or 4" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_ids_and_lengths_are_checked_by_the_models_config_alone(
    tmp_path: Path, tiny_model_path: Path, capsys
) -> None:
    """The folder has no weights, so that they cannot be read."""
    written = json.loads((tiny_model_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written))
    made = Session.__new__(Session)
    made.config = config(tmp_path).model_copy(update={"model": ModelConfig(path=str(tmp_path))})
    made.progress, made.tokenizer = Progress(), build_tokenizer()
    rows, positions = written["vocab_size"], written["max_position_embeddings"]
    made.problems = SimpleNamespace(largest_id=rows - 1, longest_prompt=positions - 7)
    made._check_limits()
    assert f"more than the {positions} that the model was made for" in capsys.readouterr().out
    made.problems = SimpleNamespace(largest_id=rows, longest_prompt=1)
    with pytest.raises(PapoError, match=rf"^token id {rows}: expected less than {rows}, the rows"):
        made._check_limits()
    table = {"model_type": "gpt2", "n_positions": 16, "vocab_size": rows}
    (tmp_path / "config.json").write_text(json.dumps(table))
    made.problems = SimpleNamespace(largest_id=1, longest_prompt=9)
    with pytest.raises(PapoError, match=r"make 17 tokens: expected at most 16, the positions"):
        made._check_limits()


def test_a_backend_that_cannot_serve_the_device_is_one_line(monkeypatch) -> None:
    """Asked for by the option or by the environment; before the model is loaded."""
    wrong, right = ("cpu", "triton") if torch.cuda.is_available() else ("cuda", "cpu")
    for name in (None, "reference", right):
        check_backend(name)
    with pytest.raises(PapoError, match=rf"^loss.backend='{wrong}': .*cannot serve") as caught:
        check_backend(wrong)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("PAPO_BACKEND", wrong)
    with pytest.raises(PapoError, match=rf"^PAPO_BACKEND: '{wrong}' cannot serve"):
        check_backend(None)


@pytest.mark.parametrize(
    ("evaluations", "score"),
    [
        ([], None),
        ([{"label": "step 2", "step": 2, "accuracy": 0.5}], None),  # of other weights
        ([{"label": "step 4", "step": 4, "accuracy": 0.25}], 0.25),
        ([{"label": "step 4", "step": 4, "invalid": 8.0}], None),  # all masked
    ],
)
def test_a_checkpoint_says_what_it_is_of_and_how_good(
    tmp_path: Path, evaluations: list, score: float | None, monkeypatch
) -> None:
    """Its options, digests, held-out accuracy and bad steps, beside every part's state."""
    made = config(tmp_path).model_copy(
        update={"checkpoint": CheckpointConfig(keep=3, keep_best=1, weights="bf16")}
    )
    health = Health(made.health, SimpleNamespace(finite=lambda: True), tmp_path, made.steps)
    health.bad_steps = 2
    recorder = SimpleNamespace(results=SimpleNamespace(evaluations=evaluations))
    part = SimpleNamespace(state_dict=lambda: {"phase": 0.5})
    digests = {"problems": "p", "model": "m"}
    parts: list[Any] = [Origin.of(None, False, print), None, None, digests, {"phase": part}]
    written: list[Any] = []
    monkeypatch.setattr(checkpoint, "save", lambda *args: written.append(args))
    monkeypatch.setattr(RunState, "_check_policy", lambda self, step: None)
    RunState(made, *parts, health, recorder).save(4, 16)
    ((folder, step, _, state, retention, weights),) = written
    assert (folder, step, weights) == (tmp_path / "checkpoints", 4, "bf16")
    assert retention == Retention(3, 1)
    assert json.loads(json.dumps(state)) == {
        "cursor": 16,
        "score": score,
        "bad_steps": 2,
        "config": made.model_dump(mode="json"),
        "problems": "p",
        "model": "m",
        "phase": {"phase": 0.5},
        "evaluations": evaluations,
    }


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_resumed_run_has_its_checkpoints_state(tmp_path: Path, monkeypatch, share: float) -> None:
    """The count of bad steps, so that it stops where the unbroken one does; the average gradient
    where it predicts with it. One that is averaged no more would predict from the past."""
    made = config(tmp_path, "auto")
    metrics = made.metrics.model_copy(update={"predict_share": share})
    made = made.model_copy(update={"metrics": metrics})
    folder = without_tensors(tmp_path / "checkpoints" / "step-00000002", bad_steps=2)
    health = Health(made.health, SimpleNamespace(finite=lambda: True), tmp_path, made.steps)
    recorder = SimpleNamespace(
        results=SimpleNamespace(), say=print, truncate_after=lambda step: None
    )
    parts: list[Any] = [Origin.of(folder, False, print), None, None, {}, {}]
    state = {"step": 2, "cursor": 8, "bad_steps": 2, "evaluations": []}
    asked: list[bool] = []
    monkeypatch.setattr(checkpoint, "load", lambda *_, average: asked.append(average) or state)
    monkeypatch.setattr(RunState, "_create_optimizer_state", lambda self: None)
    assert RunState(made, *parts, health, recorder).resume() == (2, 8)
    assert health.bad_steps == 2 and asked == [share > 0]


def test_accuracies_of_0_beside_rewards_that_are_not_are_explained_once(
    tmp_path: Path, capsys
) -> None:
    recorder = Recorder(config(tmp_path), Progress(), None, FolderLock(tmp_path))
    recorder._explain(reward=0.0, accuracy=0.0)
    recorder._explain(reward=0.9, accuracy=0.1)
    assert capsys.readouterr().out == ""
    for _ in range(2):
        recorder._explain(reward=0.9, accuracy=0.0)
    (said,) = capsys.readouterr().out.splitlines()
    assert "mean reward is 0.900" in said and "reward.success=1," in said


@pytest.mark.parametrize(
    ("added", "opened"), [("", False), ("<think>\n", True), ("<think>\n\n</think>\n", False)]
)
def test_a_template_that_opens_the_thinking_is_noticed(added: str, opened: bool) -> None:
    """Not a prompt that speaks of it."""
    template = CHAT_TEMPLATE.replace("assistant\n{%", f"assistant\n{added}{{%")
    tokenizer = build_tokenizer(template)
    messages = [{"role": "user", "content": "Think in <think>"}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert opens_thinking(tokenizer, encoded["input_ids"]) is opened
