"""Which checkpoint a run goes on from, what may lie beside it, and which ones stay."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from papo.dist import checkpoint, export, shards
from papo.dist.folders import Retention, completed, discard_after, open_partial, resolve
from papo.dist.manifest import name_of, read_manifest, step_of, verify, write_manifest
from papo.errors import PapoError
from tests.distributed.saved import FILES, SmallEngine, one_line, save


def steps(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    engine: Any = SmallEngine(seed=1)
    assert checkpoint.load(save(tmp_path, 2), engine)["cursor"] == 3
    pairs = zip(engine.state(), SmallEngine().state(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_nothing_learned_yet_is_resumed(tmp_path: Path) -> None:
    """Every step so far was skipped: there are no moments, which begin at 0."""
    engine: Any = SmallEngine()
    engine.has_moments, engine.optimizer_steps = False, 0
    folder = save(tmp_path, 1, engine)
    engine.has_moments = True
    again: Any = SmallEngine(seed=1)
    checkpoint.load(resolve("auto", tmp_path) or folder, again)
    assert again.optimizer_steps == 0
    assert all(not m.any() for m in again.state()[2:])
    assert torch.equal(again.parameters["b"], engine.parameters["b"])
    checkpoint.load(save(tmp_path, 2, again), engine)  # moments that are 0, and no step


def test_an_averaged_gradient_is_loaded_where_there_is_one_and_a_use_for_it(tmp_path: Path) -> None:
    engine: Any = SmallEngine()
    engine.average.share("b", 5).copy_(torch.arange(5))
    engine.average.count = 2
    folder, without = save(tmp_path, 1, engine), save(tmp_path, 2)
    again: Any = SmallEngine(seed=1)
    checkpoint.load(folder, again)
    assert again.average.count == 2
    assert again.average.share("b", 5).tolist() == [0, 1, 2, 3, 4]
    assert not again.average.share("a.weight", 12).any()
    for checkpointed, average in ((without, True), (folder, False)):
        checkpoint.load(folder, again)
        checkpoint.load(checkpointed, again, average=average)
        assert again.average.count == 0 and not again.average.share("b", 5).any()


def test_auto_falls_back_to_the_newest_intact_one(tmp_path: Path, caplog: Any) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    (tmp_path / "step-00000003" / "trainer.json").write_text("{}")
    (tmp_path / "damaged-step-00000003").mkdir()  # of an earlier time
    with caplog.at_level("INFO", logger="papo"):
        assert resolve("auto", tmp_path) == tmp_path / "step-00000002"
    *waits, newest, second = caplog.messages
    assert waits == [f"verifying {tmp_path / name_of(step)}" for step in (4, 3, 2)]
    assert "step-00000004 is damaged: manifest.json: missing" in newest
    assert "step-00000003 is damaged: trainer.json: " in second
    discard_after(tmp_path, 1)
    assert steps(tmp_path) == [
        "damaged-step-00000003",
        "damaged-step-00000003.1",
        "damaged-step-00000004",
        "step-00000001",
    ]


def test_auto_never_starts_over_where_all_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "trainer.json").write_text("{}")
    with pytest.raises(PapoError, match=r"no checkpoint .* can be resumed \(step-00000002: ") as e:
        resolve("auto", tmp_path)
    assert "step-00000001: trainer.json" in str(e.value) and one_line(str(e.value)[-390:])
    assert steps(tmp_path) == ["step-00000001", "step-00000002"]  # nothing is renamed


def test_a_newer_versions_checkpoint_is_no_damaged_one(tmp_path: Path) -> None:
    """Another version may go on from it."""
    save(tmp_path, 1)
    newer = save(tmp_path, 2)
    write_manifest(newer, read_manifest(newer).model_copy(update={"format": 5}))
    with pytest.raises(PapoError, match=r"step-00000002: checkpoint format 5, this version"):
        resolve("auto", tmp_path)
    assert steps(tmp_path) == ["step-00000001", "step-00000002"]


def test_the_folder_of_a_run_is_none_of_its_checkpoints(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 1)
    with pytest.raises(PapoError, match="the folder of a run; expected one of its checkpoints"):
        resolve(str(tmp_path), tmp_path / "checkpoints")


def test_an_export_to_a_name_that_no_file_system_takes_is_one_line(tmp_path: Path, capsys) -> None:
    for names in (["x" * 300, "out"], [str(save(tmp_path, 1)), "x" * 300]):
        assert export.main(names) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


def test_only_folders_named_by_a_step_are_checkpoints(tmp_path: Path) -> None:
    """What a killed process left is none, nor is a file; a link to a folder is one."""
    assert resolve("auto", tmp_path / "none") is None
    (tmp_path / ".partial-00000009").mkdir()
    (tmp_path / "step-00000008").write_text("")
    assert resolve("auto", tmp_path) is None
    (tmp_path / "step-00000003").symlink_to(save(tmp_path / "elsewhere", 3))
    assert resolve("auto", tmp_path) == tmp_path / "step-00000003"
    assert resolve("never", tmp_path) is None


def test_a_step_is_read_back_from_its_name() -> None:
    assert [step_of(name_of(step)) for step in (0, 10, 99_999_999)] == [0, 10, 99_999_999]
    others = ("step-1", "step-000000010", "damaged-step-00000010", "step-0000001x", "")
    assert {step_of(name) for name in others} == {None}


def test_a_named_folder_must_be_whole(tmp_path: Path, caplog: Any) -> None:
    folder = save(tmp_path, 1)
    with caplog.at_level("INFO", logger="papo"):
        assert resolve(str(folder), tmp_path / "another run") == folder
    assert caplog.messages == [f"verifying {folder}"]
    (folder / "trainer.json").write_text("{}")
    for resume, told in [
        (str(folder), r"damaged: trainer.json: 2 bytes, expected \d+"),
        (str(tmp_path / "none"), "no checkpoint there"),
        (str(folder / "trainer.json"), "no checkpoint there"),
        ("a\0b", "no checkpoint there"),
        (str(tmp_path), "damaged: manifest.json: missing"),
    ]:
        with pytest.raises(PapoError, match=told) as caught:
            resolve(resume, tmp_path)
        assert str(caught.value).startswith("resume=") and "\n" not in str(caught.value)


# ---- saving beside whatever is there -------------------------------------------------------------


def blocked_by() -> Iterator[tuple[str, Callable[[Path], None]]]:
    def read_only_folder(path: Path) -> None:
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "file").write_text("")
        (path / "deep").chmod(0o500)

    for name in (".partial-00000002", "step-00000002"):
        yield name, lambda path: path.write_text("") and None
        yield name, Path.mkdir
        yield name, read_only_folder
        yield name, lambda path: path.symlink_to(path.parent / "nowhere")
        yield name, lambda path: path.symlink_to(path.parent / "step-00000001")


@pytest.mark.parametrize(("name", "block"), [*blocked_by()])
def test_nothing_in_its_place_keeps_a_checkpoint_from_being_saved(
    tmp_path: Path, name: str, block: Callable[[Path], None]
) -> None:
    save(tmp_path, 1)
    block(tmp_path / name)
    assert verify(save(tmp_path, 2)) == []
    assert verify(tmp_path / "step-00000001") == []
    assert [step for step, _ in completed(tmp_path)] == [1, 2]


def test_disk_full_while_saving_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1)
    for module, name in [
        (shards, "save_file"),
        (shards, "sync"),
        (checkpoint, "replace_file"),
        (checkpoint, "write_manifest"),
        (checkpoint, "replace_folder"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(PapoError) as caught:
            patch.setattr(module, name, full)
            save(tmp_path, 2)
        told = str(caught.value)
        assert "No space left on device" in told and "free some space" in told
        assert told.endswith("Earlier checkpoints are intact") and "\n" not in told
        assert steps(tmp_path) == ["step-00000001"]
    assert verify(tmp_path / "step-00000001") == []


def test_only_a_runs_own_folder_is_swept(tmp_path: Path) -> None:
    """An export goes into any folder, where a live run may be writing a checkpoint."""
    root = tmp_path / "checkpoints"
    for folder in (tmp_path, root):
        (folder / ".partial-00000010").mkdir(parents=True)
        (folder / ".partial-mine").write_text("")
    assert open_partial(tmp_path / "my-model").name == ".partial-my-model"
    assert open_partial(tmp_path / "my-model").name == ".partial-my-model.1"
    save(root, 1)
    assert steps(root) == ["step-00000001"]
    partial = [".partial-00000010", ".partial-mine", ".partial-my-model", ".partial-my-model.1"]
    assert steps(tmp_path) == [*partial, "checkpoints"]


def test_the_model_that_a_killed_run_left_half_is_removed(tmp_path: Path, monkeypatch) -> None:
    for name in (".partial-final", ".partial-final.1", ".partial-mine"):
        (tmp_path / name).mkdir()
    policy: Any = SimpleNamespace(causal_lm=SimpleNamespace(generation_config="generation"))
    engine: Any = SimpleNamespace(
        policy=policy, inference_model=lambda: contextlib.nullcontext("model")
    )
    monkeypatch.setattr(checkpoint, "write_model", lambda folder, *parts: folder.mkdir())
    tokenizer: Any = None
    checkpoint.export(tmp_path / "final", engine, tokenizer)
    assert steps(tmp_path) == [".partial-mine", "final"]


# ---- which checkpoints stay ----------------------------------------------------------------------


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, retention=Retention(2))
    assert [step for step, _ in completed(tmp_path)] == [2, 3]


def test_bad_steps_never_rotate_a_good_checkpoint_away(tmp_path: Path) -> None:
    keep = Retention(2)
    for step, bad in [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2), (6, 3)]:
        save(tmp_path, step, bad_steps=bad, retention=keep)
    assert [step for step, _ in completed(tmp_path)] == [2, 3, 6]
    save(tmp_path, 7, retention=keep)
    assert [step for step, _ in completed(tmp_path)] == [3, 7]


def test_the_best_are_kept_with_their_weights_alone(tmp_path: Path) -> None:
    """Of equals the newer; what is not evaluated is not compared."""
    keep = Retention(keep=1, keep_best=2)
    for step, score in enumerate([0.5, 0.7, None, 0.5, 0.2, None], start=1):
        save(tmp_path, step, score=score, retention=keep)
    assert [step for step, _ in completed(tmp_path)] == [2, 4, 6]
    for step in (2, 4):
        folder = tmp_path / f"step-{step:08d}"
        assert verify(folder) == []
        assert {p.name for p in folder.iterdir()} == {*FILES} - {FILES[1]}
        with pytest.raises(PapoError, match="holds weights alone; expected a checkpoint with"):
            resolve(str(folder), tmp_path)
    assert resolve("auto", tmp_path) == tmp_path / "step-00000006"
    save(tmp_path, 7, score=0.9, retention=keep)
    save(tmp_path, 8, score=0.6, retention=keep)
    assert [step for step, _ in completed(tmp_path)] == [2, 7, 8]
    shutil.rmtree(tmp_path / "step-00000008")
    with pytest.raises(PapoError, match="weights alone"):
        resolve("auto", tmp_path)


def test_the_score_of_a_bad_step_keeps_nothing(tmp_path: Path) -> None:
    keep = Retention(keep=1, keep_best=1)
    for step, (score, bad) in enumerate([(0.5, 0), (0.6, 3), (0.1, 0)], start=1):
        save(tmp_path, step, score=score, bad_steps=bad, retention=keep)
    assert [step for step, _ in completed(tmp_path)] == [1, 3]


def test_a_damaged_checkpoint_counts_for_nothing_and_is_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    save(tmp_path, 4, retention=Retention(2))
    assert [step for step, _ in completed(tmp_path)] == [2, 3, 4]
