"""One run in a folder: the second is told, a killed one blocks nothing, nothing empty is left."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest

from papo.errors import PapoError
from papo.record import lock
from papo.record.lock import FolderLock


def told_to_the_second(folder: Path) -> str:
    with pytest.raises(PapoError) as caught:
        FolderLock(folder)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"output_dir={str(folder)!r}: ")
    return text


def test_the_second_run_is_told_who_is_there_and_what_to_do(tmp_path: Path) -> None:
    """Another open file conflicts in one process as it does in two."""
    first = FolderLock(tmp_path / "run")
    told = told_to_the_second(tmp_path / "run")
    assert f"(process {os.getpid()} on {socket.gethostname()} since 20" in told
    assert "another run is writing there" in told and "choose another output_dir" in told
    first.close()
    FolderLock(tmp_path / "run").close()


@pytest.mark.parametrize("text", ["", "process 1 on \x00\xff\n\x1b[31m"])
def test_what_a_lock_file_says_is_not_relied_on(tmp_path: Path, text: str) -> None:
    """The first run may not have signed it yet."""
    first = FolderLock(tmp_path / "run")
    (tmp_path / "run" / lock.NAME).write_text(text)
    assert "writing there; wait" in told_to_the_second(tmp_path / "run")
    first.close()


def test_the_file_of_a_killed_run_blocks_nothing(tmp_path: Path) -> None:
    """Whatever is in it; closing the descriptor is all that a kill does."""
    killed = FolderLock(tmp_path / "run")
    assert killed._fd is not None
    os.close(killed._fd)
    assert (tmp_path / "run" / lock.NAME).exists()
    FolderLock(tmp_path / "run").close()
    assert not any((tmp_path / "run").iterdir())


def test_processes_that_a_run_starts_do_not_inherit_the_lock(tmp_path: Path) -> None:
    held = FolderLock(tmp_path / "run")
    assert held._fd is not None and not os.get_inheritable(held._fd)
    held.close()


def test_a_folder_made_for_the_lock_alone_goes_with_it(tmp_path: Path) -> None:
    """Parents too, unless something came into them."""
    FolderLock(tmp_path / "runs" / "deep" / "test").close()
    assert not (tmp_path / "runs").exists()
    held = FolderLock(tmp_path / "runs" / "test")
    (tmp_path / "runs" / "test" / "config.yaml").touch()
    held.close()
    assert [p.name for p in (tmp_path / "runs" / "test").iterdir()] == ["config.yaml"]
    FolderLock(tmp_path / "runs" / "test").close()
    assert (tmp_path / "runs" / "test" / "config.yaml").exists()


def test_the_other_ranks_touch_nothing(tmp_path: Path) -> None:
    FolderLock(tmp_path / "run", enabled=False).close()
    assert not any(tmp_path.iterdir())


def test_moving_aside_keeps_the_folder_locked(tmp_path: Path) -> None:
    """The name of the folder is what other runs know."""
    folder = tmp_path / "run"
    held = FolderLock(folder)
    (folder / "metrics.jsonl").write_text("a")
    assert held.move_aside() == tmp_path / "run.1"
    told_to_the_second(folder)
    assert [p.name for p in folder.iterdir()] == [lock.NAME]
    assert [p.name for p in (tmp_path / "run.1").iterdir()] == ["metrics.jsonl"]
    FolderLock(tmp_path / "run.1").close()  # its run is over
    held.close()
    assert [p.name for p in tmp_path.iterdir()] == ["run.1"]


def test_a_run_that_comes_between_is_not_written_over(tmp_path: Path, monkeypatch) -> None:
    """In the moment at which the earlier folder has gone and the new one is not there yet."""
    folder, rename, others = tmp_path / "run", Path.rename, []
    held = FolderLock(folder)
    (folder / "metrics.jsonl").write_text("a")

    def renamed(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if path == folder:
            others.append(FolderLock(folder))
        return moved

    monkeypatch.setattr(Path, "rename", renamed)
    with pytest.raises(OSError, match="not empty"):
        held.move_aside()
    told_to_the_second(folder)  # by the run that came between
    others[0].close()


@pytest.mark.parametrize("failing", ["run", ".run.fresh"])
def test_a_folder_that_cannot_move_aside_is_left_as_it_was(
    tmp_path: Path, failing: str, monkeypatch
) -> None:
    folder, rename = tmp_path / "run", Path.rename
    held = FolderLock(folder)
    (folder / "metrics.jsonl").write_text("a")
    descriptors = os.listdir("/proc/self/fd")

    def renamed(path: Path, target: Path) -> Path:
        if path.name == failing:
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(Path, "rename", renamed)
        held.move_aside()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert sorted(p.name for p in folder.iterdir()) == [lock.NAME, "metrics.jsonl"]
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    told_to_the_second(folder)
    held.close()
    FolderLock(folder).close()


def test_a_file_that_is_removed_while_it_is_locked_is_no_lock(tmp_path: Path, monkeypatch) -> None:
    """A run that ends removes its file: who had opened it before would hold a lock on nothing."""
    path, flock = tmp_path / "run" / lock.NAME, fcntl.flock
    removals = iter([True, False, False])

    def flocked(fd: int, how: int) -> None:
        flock(fd, how)
        if next(removals):
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", flocked)
    held = FolderLock(tmp_path / "run")
    assert held._fd is not None and os.path.samestat(os.fstat(held._fd), os.stat(path))
    monkeypatch.undo()
    told_to_the_second(tmp_path / "run")
    held.close()


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    held = FolderLock(tmp_path / "run")
    assert "Function not implemented" in held.warning and "second run" in held.warning
    held.close()


def of_a_file(root: Path) -> Path:
    (root / "file").touch()
    return root / "file" / "run"


def of_a_read_only_parent(root: Path) -> Path:
    """As the system would say it to who is not root."""
    return Path("/proc/version/run")


CANNOT_BE_MADE = {
    "NUL": (lambda root: root / "a\0b", "null"),
    "surrogate": (lambda root: root / "a\ud800b", "surrogate"),
    "long": (lambda root: root / ("a" * 300), "too long"),
    "a file's": (of_a_file, "directory"),
    "a file": (lambda root: of_a_file(root).parent, "exists"),
    "not ours": (of_a_read_only_parent, "directory"),
}


@pytest.mark.parametrize("kind", CANNOT_BE_MADE)
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, kind: str) -> None:
    make, reason = CANNOT_BE_MADE[kind]
    told = told_to_the_second(make(tmp_path))
    assert reason in told.lower() and told.endswith("choose another output_dir")


@pytest.mark.parametrize("failing", ["mkdir", "open", "pwrite"])
def test_what_the_system_refuses_is_one_line_and_leaves_nothing(
    tmp_path: Path, failing: str, monkeypatch
) -> None:
    """A parent or a folder that is read-only, a full disk."""
    folder = tmp_path / "run"
    real = getattr(os, failing)

    def refuse(path: object, *args: object, **options: object) -> object:
        if failing == "pwrite" or str(path).startswith(str(folder)):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **options)

    monkeypatch.setattr(os, failing, refuse)
    assert "Permission denied" in told_to_the_second(folder)
    monkeypatch.undo()
    assert not any(tmp_path.iterdir())
