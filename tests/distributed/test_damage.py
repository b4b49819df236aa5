"""Whatever happens to the files of a checkpoint is found and named in one line."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from papo.dist import checkpoint, manifest
from papo.dist.manifest import read_trainer, verify
from papo.errors import PapoError
from tests.distributed.saved import (
    FILES,
    SmallEngine,
    edit_tensors,
    edit_trainer,
    one_line,
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


OFTEN = {flip: 24, cut: 8, zeros: 8, append: 6, random_bytes: 4}
ONCE = (delete, empty, folder_instead, pipe_instead, loop_instead)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("pristine"), 2)
    assert {p.name for p in folder.iterdir()} == {*FILES}
    assert verify(folder) == []
    return folder


@pytest.fixture
def folder(tmp_path: Path, pristine: Path) -> Path:
    """A checkpoint to damage."""
    return copied(pristine, tmp_path)


def copied(pristine: Path, root: Path) -> Path:
    made = root / pristine.name
    shutil.copytree(pristine, made)
    return made


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
        faults = verify(made)
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
    assert (verify(folder) == []) == (first == second)


def test_files_of_another_checkpoint_are_found(folder: Path, tmp_path: Path) -> None:
    """Each of them alone, and the whole folder under another step's name."""
    other = save(tmp_path / "other", 3, SmallEngine(seed=1))
    for name in FILES:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes((other / name).read_bytes())
        assert verify(folder), name
        (folder / name).write_bytes(content)
    renamed = folder.rename(folder.with_name("step-00000009"))
    assert verify(renamed) == ["trainer.json: step 2 in a folder named step-00000009"]


def test_other_files_in_the_folder_are_nobodys_business(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "weights-00009-of-00010-00001.safetensors").write_bytes(b"")
    assert verify(folder) == []


def test_a_file_that_would_fill_the_memory_is_not_read(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(manifest, "_LARGEST_FILE", 64)
    assert verify(folder) == ["manifest.json: expected at most 0 KiB"]
    with pytest.raises(PapoError, match=r"^trainer.json: expected at most 0 KiB$"):
        read_trainer(folder)


# ---- content that fits its digests ---------------------------------------------------------------

HUGE = b"9" * 5000
MANIFESTS = {
    "nesting": b'"format": 4, "resumable": true, "files": ' + b"[" * 100_000 + b"}",
    "huge integer": b'"format": ' + HUGE + b"}",
    "huge size": b'"format": 4, "resumable": true, "files": {"trainer.json": {"size": '
    + HUGE
    + b', "sha256": "'
    + b"0" * 64
    + b'"}}}',
    "wrong type": b'"format": 4, "resumable": 1, "files": []}',
    "list of files": b'"format": 4, "resumable": true, "files": ["trainer.json"]}',
    "no files": b'"format": 4, "resumable": true, "files": {}}',
    "another format": b'"format": 5}',
    "format of text": b'"format": "\\n\\u0000"}',
    "a path out of the folder": b'"format": 4, "resumable": true, "files": {"../x": {"size": 1, '
    b'"sha256": "' + b"0" * 64 + b'"}}}',
    "a null byte": b'"format": 4, "resumable": true, "files": {"a\\u0000": null}}',
    "not UTF-8": b'"format": "\xff\xfe"}',
    "half a surrogate": b'"format": 4, "resumable": true, "files": {"\\ud800": {}}}',
    "a constant": b'"format": NaN}',
    "nothing": b"",
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_of_anything_is_one_line(folder: Path, content: bytes) -> None:
    sign_text(folder, content)
    (fault,) = verify(folder)
    assert one_line(fault), fault


def test_a_checkpoint_of_another_format_says_so(folder: Path) -> None:
    sign_text(folder, MANIFESTS["another format"])
    assert verify(folder) == ["checkpoint format 5, this version reads 4"]


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
    sign_text(folder, json.dumps({"format": 4, "resumable": True, "files": files})[1:].encode())
    (fault,) = verify(folder)
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
    (fault,) = verify(folder)
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
    assert verify(folder) == []  # the digests fit
    engine: Any = SmallEngine()
    with pytest.raises(PapoError, match=told) as caught:
        checkpoint.load(folder, engine)
    assert one_line(str(caught.value))


def test_a_model_of_other_shapes_is_refused(folder: Path) -> None:
    engine: Any = SmallEngine(shape=(4, 3))
    with pytest.raises(PapoError, match=r"a.weight has shape \(3, 4\), the model's is \(4, 3\)"):
        checkpoint.load(folder, engine)
