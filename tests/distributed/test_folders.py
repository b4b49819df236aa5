"""Which checkpoint a run goes on from, what may lie beside it, and which ones stay."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from papo.dist import checkpoint, shards
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
    checkpoint.load(checkpoint.resolve("auto", tmp_path) or folder, again)
    assert again.optimizer_steps == 0
    assert all(not m.any() for m in again.state()[2:])
    assert torch.equal(again.parameters["b"], engine.parameters["b"])
    checkpoint.load(save(tmp_path, 2, again), engine)  # moments that are 0, and no step


def test_auto_falls_back_to_the_newest_intact_one(tmp_path: Path, caplog: Any) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    (tmp_path / "step-00000003" / "trainer.json").write_text("{}")
    (tmp_path / "damaged-step-00000003").mkdir()  # of an earlier time
    with caplog.at_level("WARNING", logger="papo"):
        assert checkpoint.resolve("auto", tmp_path) == tmp_path / "step-00000002"
    assert len(caplog.messages) == 2
    assert "step-00000004 is damaged: manifest.json: missing" in caplog.messages[0]
    assert "step-00000003 is damaged: trainer.json: " in caplog.messages[1]
    checkpoint.discard_after(tmp_path, 1)
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
        checkpoint.resolve("auto", tmp_path)
    assert "step-00000001: trainer.json" in str(e.value) and one_line(str(e.value)[-390:])
    assert steps(tmp_path) == ["step-00000001", "step-00000002"]  # nothing is renamed


def test_only_folders_named_by_a_step_are_checkpoints(tmp_path: Path) -> None:
    """What a killed process left is none, nor is a file; a link to a folder is one."""
    assert checkpoint.resolve("auto", tmp_path / "none") is None
    (tmp_path / ".partial-00000009").mkdir()
    (tmp_path / "step-00000008").write_text("")
    assert checkpoint.resolve("auto", tmp_path) is None
    (tmp_path / "step-00000003").symlink_to(save(tmp_path / "elsewhere", 3))
    assert checkpoint.resolve("auto", tmp_path) == tmp_path / "step-00000003"
    assert checkpoint.resolve("never", tmp_path) is None


def test_a_named_folder_must_be_whole(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert checkpoint.resolve(str(folder), tmp_path / "another run") == folder
    (folder / "trainer.json").write_text("{}")
    for resume, told in [
        (str(folder), r"damaged: trainer.json: 2 bytes, expected \d+"),
        (str(tmp_path / "none"), "no checkpoint there"),
        (str(folder / "trainer.json"), "no checkpoint there"),
        ("a\0b", "no checkpoint there"),
        (str(tmp_path), "damaged: manifest.json: missing"),
    ]:
        with pytest.raises(PapoError, match=told) as caught:
            checkpoint.resolve(resume, tmp_path)
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
    assert checkpoint.verify(save(tmp_path, 2)) == []
    assert checkpoint.verify(tmp_path / "step-00000001") == []
    assert [step for step, _ in checkpoint.completed(tmp_path)] == [1, 2]


def test_disk_full_while_saving_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1)
    for module, name in [
        (shards, "save_file"),
        (shards, "sync"),
        (checkpoint, "write_synced"),
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
    assert checkpoint.verify(tmp_path / "step-00000001") == []


# ---- which checkpoints stay ----------------------------------------------------------------------


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, retention=checkpoint.Retention(2))
    assert [step for step, _ in checkpoint.completed(tmp_path)] == [2, 3]


def test_bad_steps_never_rotate_a_good_checkpoint_away(tmp_path: Path) -> None:
    keep = checkpoint.Retention(2)
    for step, bad in [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2), (6, 3)]:
        save(tmp_path, step, bad_steps=bad, retention=keep)
    assert [step for step, _ in checkpoint.completed(tmp_path)] == [2, 3, 6]
    save(tmp_path, 7, retention=keep)
    assert [step for step, _ in checkpoint.completed(tmp_path)] == [3, 7]


def test_the_best_are_kept_with_their_weights_alone(tmp_path: Path) -> None:
    """Of equals the newer; what is not evaluated is not compared."""
    keep = checkpoint.Retention(keep=1, keep_best=2)
    for step, score in enumerate([0.5, 0.7, None, 0.5, 0.2, None], start=1):
        save(tmp_path, step, score=score, retention=keep)
    assert [step for step, _ in checkpoint.completed(tmp_path)] == [2, 4, 6]
    for step in (2, 4):
        folder = tmp_path / f"step-{step:08d}"
        assert checkpoint.verify(folder) == []
        assert {p.name for p in folder.iterdir()} == {*FILES} - {FILES[1]}
        with pytest.raises(PapoError, match="holds weights alone; expected a checkpoint with"):
            checkpoint.resolve(str(folder), tmp_path)
    assert checkpoint.resolve("auto", tmp_path) == tmp_path / "step-00000006"
    save(tmp_path, 7, score=0.9, retention=keep)
    save(tmp_path, 8, score=0.6, retention=keep)
    assert [step for step, _ in checkpoint.completed(tmp_path)] == [2, 7, 8]
    shutil.rmtree(tmp_path / "step-00000008")
    with pytest.raises(PapoError, match="weights alone"):
        checkpoint.resolve("auto", tmp_path)


def test_a_damaged_checkpoint_counts_for_nothing_and_is_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    save(tmp_path, 4, retention=checkpoint.Retention(2))
    assert [step for step, _ in checkpoint.completed(tmp_path)] == [2, 3, 4]
