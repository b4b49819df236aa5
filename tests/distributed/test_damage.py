"""Whatever happens to the files of a checkpoint is found, named in one line, and passed by."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from papo.dist import checkpoint, shards
from papo.errors import PapoError
from tests.distributed.saved import (
    SmallEngine,
    edit_tensors,
    edit_trainer,
    save,
    sign_text,
)

Damage = Callable[[Path, random.Random], None]


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def zeros(path: Path, rng: random.Random) -> None:
    """A block that was never written."""
    content = bytearray(path.read_bytes())
    begin = rng.randrange(len(content) - 16)
    content[begin : begin + 16] = bytes(16)
    path.write_bytes(content)


def append(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.choice([b"\0", b"\n", b" ", b"{}", bytes(100)]))


def random_bytes(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.randrange(1, 300)))


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def folder_instead(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path, rng: random.Random) -> None:
    """Whoever opens it waits forever."""
    path.unlink()
    os.mkfifo(path)


def loop_instead(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path)


FILES = (
    "weights-00000-of-00001-00001.safetensors",
    "optimizer-00000-of-00001-00001.safetensors",
    "trainer.json",
    "manifest.json",
)
OFTEN = {flip: 24, cut: 8, zeros: 8, append: 6, random_bytes: 4}
ONCE = (delete, empty, folder_instead, pipe_instead, loop_instead)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("pristine"), 2)
    assert {p.name for p in folder.iterdir()} == {*FILES}
    assert checkpoint.verify(folder) == []
    return folder


@pytest.fixture
def folder(tmp_path: Path, pristine: Path) -> Path:
    """A checkpoint to damage."""
    return copied(pristine, tmp_path)


def copied(pristine: Path, root: Path) -> Path:
    made = root / pristine.name
    shutil.copytree(pristine, made)
    return made


def one_line(fault: str) -> bool:
    return "\n" not in fault and fault.isprintable() and len(fault) < 400


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [*OFTEN, *ONCE], ids=lambda damage: damage.__name__)
def test_every_damage_of_every_file_is_found(
    pristine: Path, tmp_path: Path, damage: Damage, name: str
) -> None:
    for seed in range(OFTEN.get(damage, 1)):
        made = copied(pristine, tmp_path / str(seed))
        before = (made / name).read_bytes()
        damage(made / name, random.Random(seed))
        if (made / name).is_file() and (made / name).read_bytes() == before:
            continue  # zeros over zeros
        faults = checkpoint.verify(made)
        assert faults and all(one_line(fault) for fault in faults), seed
        assert any(fault.startswith(name) for fault in faults), (seed, faults)


def test_there_are_many_of_them() -> None:
    assert len(FILES) * (sum(OFTEN.values()) + len(ONCE)) >= 200


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
def test_swapped_files_are_found(folder: Path, first: int, second: int) -> None:
    paths = folder / FILES[first], folder / FILES[second]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    assert (checkpoint.verify(folder) == []) == (first == second)


def test_files_of_another_checkpoint_are_found(folder: Path, tmp_path: Path) -> None:
    """Each of them alone, and the whole folder under another step's name."""
    other = save(tmp_path / "other", 3, SmallEngine(seed=1))
    for name in FILES:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes((other / name).read_bytes())
        assert checkpoint.verify(folder), name
        (folder / name).write_bytes(content)
    renamed = folder.rename(folder.with_name("step-00000009"))
    assert checkpoint.verify(renamed) == ["trainer.json: step 2 in a folder named step-00000009"]


def test_other_files_in_the_folder_are_nobodys_business(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "weights-00009-of-00010-00001.safetensors").write_bytes(b"")
    assert checkpoint.verify(folder) == []


# ---- content that fits its digests ---------------------------------------------------------------

HUGE = b"9" * 5000
MANIFESTS = {
    "nesting": b'"format": 3, "resumable": true, "files": ' + b"[" * 100_000 + b"}",
    "huge integer": b'"format": ' + HUGE + b"}",
    "huge size": b'"format": 3, "resumable": true, "files": {"trainer.json": {"size": '
    + HUGE
    + b', "sha256": "'
    + b"0" * 64
    + b'"}}}',
    "wrong type": b'"format": 3, "resumable": 1, "files": []}',
    "list of files": b'"format": 3, "resumable": true, "files": ["trainer.json"]}',
    "no files": b'"format": 3, "resumable": true, "files": {}}',
    "another format": b'"format": 4}',
    "format of text": b'"format": "\\n\\u0000"}',
    "a path out of the folder": b'"format": 3, "resumable": true, "files": {"../x": {"size": 1, '
    b'"sha256": "' + b"0" * 64 + b'"}}}',
    "a null byte": b'"format": 3, "resumable": true, "files": {"a\\u0000": null}}',
    "not UTF-8": b'"format": "\xff\xfe"}',
    "half a surrogate": b'"format": 3, "resumable": true, "files": {"\\ud800": {}}}',
    "a constant": b'"format": NaN}',
    "nothing": b"",
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_of_anything_is_one_line(folder: Path, content: bytes) -> None:
    sign_text(folder, content)
    (fault,) = checkpoint.verify(folder)
    assert one_line(fault), fault


def test_a_checkpoint_of_another_format_says_so(folder: Path) -> None:
    sign_text(folder, MANIFESTS["another format"])
    assert checkpoint.verify(folder) == ["checkpoint format 4, this version reads 3"]


TRAINERS: dict[str, bytes] = {
    "nesting": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "huge integer": b'{"step": ' + HUGE + b"}",
    "not UTF-8": b'{"a": "\xff"}',
    "null bytes": bytes(50),
    "a list": b"[]",
    "nothing": b"",
    "text": b'"step"',
}


@pytest.mark.parametrize("content", TRAINERS.values(), ids=TRAINERS)
def test_a_trainer_json_of_anything_is_one_line(folder: Path, content: bytes) -> None:
    good = json.loads((folder / "manifest.json").read_text())
    (folder / "trainer.json").write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "keys": []}
    files = {**good["files"], "trainer.json": entry}
    sign_text(folder, json.dumps({"format": 3, "resumable": True, "files": files})[1:].encode())
    (fault,) = checkpoint.verify(folder)
    assert fault.startswith("trainer.json: ") and one_line(fault), fault


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"step": 5}, "step 5 in a folder named step-00000002"),
        ({"step": 2.0}, "trainer.json: step: .*integer"),
        ({"step": True}, "trainer.json: step: .*integer"),
        ({"cursor": -1}, "trainer.json: cursor: .*greater than or equal to 0"),
        ({"cursor": "0"}, "trainer.json: cursor: .*integer"),
        ({"optimizer_steps": 10**400}, "trainer.json: optimizer_steps: "),
        ({"shapes": {"b": [-5]}}, "trainer.json: shapes.b.0: "),
        ({"score": float("nan")}, "trainer.json: score: .*finite"),
    ],
)
def test_counts_that_are_none_are_found(folder: Path, changes: dict[str, Any], told: str) -> None:
    edit_trainer(folder, **changes)
    (fault,) = checkpoint.verify(folder)
    assert one_line(fault)
    with pytest.raises(PapoError, match=told):
        raise PapoError(fault)


def spoiled(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[sorted(tensors)[0]][1] = value
        return tensors

    return edit


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {new if key == old else key: t for key, t in tensors.items()}


A, B = "weight/a.weight[0:12]", "weight/b[0:5]"


@pytest.mark.parametrize(
    ("part", "edit", "told"),
    [
        ("weights", spoiled(float("nan")), "NaN or infinity in weight/a.weight"),
        ("optimizer", spoiled(float("inf")), "NaN or infinity in exp_avg/a.weight"),
        ("weights", lambda t: {A: t[A]}, "no tensor weight/b: .*another model"),
        ("weights", lambda t: {**t, "weight/c[0:5]": t[B]}, "unknown weight/c: .*another model"),
        ("weights", lambda t: {**t, "bias/b[0:5]": t[B]}, "unknown bias/b"),
        ("weights", lambda t: {**t, "weight/b": t[B]}, "unknown tensor 'weight/b'"),
        ("weights", lambda t: {**t, "weight/b[0:2]": t[B][:2]}, "every element once"),
        ("weights", renamed(B, "weight/b[1:6]"), "every element once"),
        ("weights", renamed(B, "weight/b[0:4]"), "weight/b has 4 elements, the model's b 5"),
        ("weights", lambda t: {**t, B: t[B].bfloat16()}, r"weight/b\[0:5\] in .* is BF16 \[5\]"),
        ("weights", lambda t: {**t, B: t[B][:4]}, r"weight/b\[0:5\] in .* is F32 \[4\]"),
        ("weights", lambda t: {**t, A: t[A].view(3, 4)}, r"is F32 \[3, 4\]"),
        (
            "optimizer",
            lambda t: {k: v for k, v in t.items() if "sq" not in k},
            "no tensor exp_avg_",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(
    folder: Path, part: str, edit: Any, told: str
) -> None:
    edit_tensors(folder, part, edit)
    assert checkpoint.verify(folder) == []  # the digests fit
    engine: Any = SmallEngine()
    with pytest.raises(PapoError, match=told) as caught:
        checkpoint.load(folder, engine)
    assert one_line(str(caught.value))


def test_a_model_of_other_shapes_is_refused(folder: Path) -> None:
    engine: Any = SmallEngine(shape=(4, 3))
    with pytest.raises(PapoError, match=r"a.weight has shape \(3, 4\), the model's is \(4, 3\)"):
        checkpoint.load(folder, engine)


# ---- which checkpoint a run goes on from ---------------------------------------------------------


def steps(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_what_was_saved_is_loaded(folder: Path) -> None:
    engine: Any = SmallEngine(seed=1)
    assert checkpoint.load(folder, engine)["cursor"] == 3
    pairs = zip(engine.state(), SmallEngine().state(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_nothing_learned_yet_is_resumed(tmp_path: Path) -> None:
    """Every step so far was skipped: there are no moments, which begin at 0."""
    engine: Any = SmallEngine()
    engine.has_moments, engine.optimizer_steps = False, 0
    folder = save(tmp_path, 1, engine)
    again: Any = SmallEngine(seed=1)
    checkpoint.load(checkpoint.resolve("auto", tmp_path) or folder, again)
    assert again.optimizer_steps == 0
    assert all(not m.any() for m in again.state()[2:])
    assert torch.equal(again.parameters["b"], engine.parameters["b"])


def test_auto_falls_back_to_the_newest_intact_one(tmp_path: Path, caplog: Any) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    append(tmp_path / "step-00000003" / "trainer.json", random.Random(0))
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
