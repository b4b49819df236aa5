"""What can happen to a checkpoint on a disk: to one of its files, to its folder, to all of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

_RANGE = 4096  # the largest range that is zeroed or appended, a page


def flip(path: Path, older: Path, rng: Random) -> str:
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place}"


def cut(path: Path, older: Path, rng: Random) -> str:
    length = rng.randrange(path.stat().st_size)
    os.truncate(path, length)
    return f"to {length} bytes"


def zero(path: Path, older: Path, rng: Random) -> str:
    data = bytearray(path.read_bytes())
    begin = rng.randrange(len(data))
    end = min(len(data), begin + rng.randint(1, _RANGE))
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    return f"bytes {begin} to {end}"


def append(path: Path, older: Path, rng: Random) -> str:
    added = rng.randbytes(rng.randint(1, _RANGE))
    with path.open("ab") as file:
        file.write(added)
    return f"{len(added)} bytes"


def swap(path: Path, older: Path, rng: Random) -> str:
    other = rng.choice(sorted(p for p in path.parent.iterdir() if p != path))
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)
    return f"with {other.name}"


def delete(path: Path, older: Path, rng: Random) -> str:
    path.unlink()
    return ""


def empty(path: Path, older: Path, rng: Random) -> str:
    os.truncate(path, 0)
    return ""


def become_folder(path: Path, older: Path, rng: Random) -> str:
    path.unlink()
    path.mkdir()
    return ""


def become_link(path: Path, older: Path, rng: Random) -> str:
    target = rng.choice([path.name, "nowhere", os.devnull, ".."])
    path.unlink()
    path.symlink_to(target)
    return f"to {target}"


def forbid(path: Path, older: Path, rng: Random) -> str:
    path.chmod(0)  # root may read it all the same
    return ""


def age(path: Path, older: Path, rng: Random) -> str:
    """The same file of the checkpoint before, as after a copy that was interrupted."""
    shutil.copyfile(older / path.name, path)
    return ""


FILE_DAMAGES: dict[str, Callable[[Path, Path, Random], str]] = {
    "bit flipped": flip,
    "cut": cut,
    "zeroed": zero,
    "appended": append,
    "swapped": swap,
    "deleted": delete,
    "emptied": empty,
    "a folder": become_folder,
    "a link": become_link,
    "unreadable": forbid,
    "an older one": age,
}


def _clear(newest: Path, older: Path, rng: Random) -> None:
    for path in newest.iterdir():
        path.unlink()


def _remove(newest: Path, older: Path, rng: Random) -> None:
    shutil.rmtree(newest)


def _become_file(newest: Path, older: Path, rng: Random) -> None:
    shutil.rmtree(newest)
    newest.write_bytes(b"")


def _become_link(newest: Path, older: Path, rng: Random) -> None:
    shutil.rmtree(newest)
    newest.symlink_to(rng.choice(["nowhere", newest.name]))


def _forbid(newest: Path, older: Path, rng: Random) -> None:
    newest.chmod(0)


def _age(newest: Path, older: Path, rng: Random) -> None:
    shutil.rmtree(newest)
    shutil.copytree(older, newest)


def _mix(newest: Path, older: Path, rng: Random) -> None:
    """Half of the files are those of the checkpoint before."""
    names = sorted(path.name for path in newest.iterdir())
    for name in rng.sample(names, len(names) // 2):
        shutil.copyfile(older / name, newest / name)


def _leave_partial(newest: Path, older: Path, rng: Random) -> None:
    """A save that was killed, and one that left a file where its folder should be."""
    partial = newest.with_name(newest.name.replace("step-", ".partial-"))
    newest.rename(partial)
    following = int(newest.name.removeprefix("step-")) + 1
    newest.with_name(f".partial-{following:08d}").write_bytes(b"")


FOLDER_DAMAGES: dict[str, Callable[[Path, Path, Random], None]] = {
    "folder cleared": _clear,
    "folder removed": _remove,
    "folder a file": _become_file,
    "folder a link": _become_link,
    "folder unreadable": _forbid,
    "folder an older one": _age,
    "folder half an older one": _mix,
    "folder never renamed": _leave_partial,
}


def _cut_both(newest: Path, older: Path, rng: Random) -> None:
    for folder in (newest, older):
        cut(rng.choice(sorted(folder.iterdir())), older, rng)


def _flip_everywhere(newest: Path, older: Path, rng: Random) -> None:
    for folder in (newest, older):
        for path in folder.iterdir():
            flip(path, older, rng)


def _exchange(newest: Path, older: Path, rng: Random) -> None:
    aside = newest.with_name("aside")
    newest.rename(aside)
    older.rename(newest)
    aside.rename(older)


def _promote(newest: Path, older: Path, rng: Random) -> None:
    """The checkpoint before under the name of a later step, beside the newest."""
    older.rename(newest.with_name("step-00000099"))


def _lose_all(newest: Path, older: Path, rng: Random) -> None:
    shutil.rmtree(newest.parent)


# Damages that touch every checkpoint: a run may be refused.
TOTAL_DAMAGES: dict[str, Callable[[Path, Path, Random], None]] = {
    "all cut": _cut_both,
    "all flipped": _flip_everywhere,
    "all exchanged": _exchange,
    "all misnamed": _promote,
    "all removed": _lose_all,
}


class Damage(NamedTuple):
    """A damage by its name.

    Attributes:
        file: which file of the newest checkpoint, empty for its folder and for all checkpoints.
    """

    kind: str
    file: str = ""

    @property
    def spares_older(self) -> bool:
        """Whether the checkpoint before the newest is left intact, to resume from."""
        return self.kind not in TOTAL_DAMAGES

    def apply(self, newest: Path, older: Path, rng: Random) -> str:
        """Damage; what was done, in words."""
        if self.file:
            done = FILE_DAMAGES[self.kind](newest / self.file, older, rng)
            return f"{self.file} {self.kind} {done}".strip()
        {**FOLDER_DAMAGES, **TOTAL_DAMAGES}[self.kind](newest, older, rng)
        return self.kind


def all_damages(newest: Path) -> list[Damage]:
    """Every damage of a checkpoint with the files of `newest`."""
    files = sorted(path.name for path in newest.iterdir())
    of_files = [Damage(kind, name) for name in files for kind in FILE_DAMAGES]
    return of_files + [Damage(kind) for kind in (*FOLDER_DAMAGES, *TOTAL_DAMAGES)]


def permit(folder: Path) -> None:
    """Give back all permissions below `folder`, so that it can be copied and removed."""
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *files)):
            if not path.is_symlink():
                path.chmod(0o700)
