"""What a checkpoint's folder must hold, to the byte, and whether it does.

`manifest.json` is written last. It has size and SHA-256 of every other file, and its own digest
over everything that follows the digest. No pickles: nothing read here can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError

from papo.dist import collectives
from papo.errors import PapoError
from papo.inputs import read_bytes, read_json_object
from papo.outputs import replace_file

FORMAT = 4
OTHER_FORMAT = "checkpoint format"  # so begins the only fault of an intact checkpoint
MANIFEST = "manifest.json"
TRAINER = "trainer.json"
_HEAD = re.compile(rb'\{"sha256": "([0-9a-f]{64})", (.*)', re.DOTALL)
_NAME = re.compile(r"step-(\d{8})")
# What a thousand ranks write of thousands of parameters is less.
_LARGEST_FILE = 1 << 30

# Nothing in another folder, and nothing that is not a checkpoint's.
_FileName = Annotated[
    str, Field(pattern=r"^(trainer\.json|(weights|optimizer)-\d{5}-of-\d{5}-\d{5}\.safetensors)$")
]
_Count = Annotated[NonNegativeInt, Field(lt=1 << 53)]


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of a file, and the keys of the tensors in it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    size: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    keys: list[str] = []


class Manifest(BaseModel):
    """Every file of a checkpoint by name; `resumable` as long as the optimizer's part is there."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    sha256: str = ""
    format: int
    resumable: bool
    files: dict[_FileName, FileEntry]


class TrainerState(BaseModel):
    """What every trainer.json has; the parts of the trainer add their own."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    step: _Count
    cursor: _Count = 0
    optimizer_steps: _Count
    averaged_gradients: _Count = 0
    shapes: dict[str, list[_Count]]
    score: FiniteFloat | None = None
    bad_steps: _Count = 0


class _Format(BaseModel):
    format: Any


def name_of(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder, None where `name` is not the name of one."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def entry_of(path: Path, keys: list[str]) -> FileEntry:
    """Size and digest of a file as it is.

    Raises:
        OSError: it cannot be read.
    """
    return FileEntry(size=path.stat().st_size, sha256=sha256_of(path), keys=keys)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write or replace the folder's manifest, whole or not at all.

    Raises:
        OSError: it cannot be written; an earlier one is still there.
    """
    content = json.dumps(manifest.model_dump(exclude={"sha256"}), indent=1)[1:].lstrip()
    digest = hashlib.sha256(content.encode()).hexdigest()
    replace_file(folder / MANIFEST, f'{{"sha256": "{digest}", {content}'.encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        PapoError: it is missing, damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise PapoError(f"{MANIFEST}: missing (or written by an earlier version)")
    try:
        raw = read_bytes(path, _LARGEST_FILE)
    except ValueError as error:
        raise PapoError(f"{MANIFEST}: {error}") from error
    head = _HEAD.fullmatch(raw)
    if head is None or head[1].decode() != hashlib.sha256(head[2]).hexdigest():
        raise PapoError(f"{MANIFEST}: its SHA-256 is another than the one it names")
    try:
        found = _Format.model_validate_json(raw).format
        if found != FORMAT:
            raise PapoError(f"{OTHER_FORMAT} {found!r}, this version reads {FORMAT}")
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise PapoError(f"{MANIFEST}: {_explain(error)}") from error
    if TRAINER not in manifest.files:
        raise PapoError(f"{MANIFEST}: names no {TRAINER}")
    return manifest


def read_trainer(folder: Path) -> TrainerState:
    """The trainer's part of a checkpoint.

    Raises:
        PapoError: it is not what a trainer wrote, or of another step than the folder's name.
    """
    try:
        state = TrainerState.model_validate(read_json_object(folder / TRAINER, _LARGEST_FILE))
    except ValidationError as error:
        raise PapoError(f"{TRAINER}: {_explain(error)}") from error
    except ValueError as error:
        raise PapoError(f"{TRAINER}: {error}") from error
    name = Path(os.path.abspath(folder)).name
    if step_of(name) not in (None, state.step):
        raise PapoError(f"{TRAINER}: step {state.step} in a folder named {name}")
    return state


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file; empty if nothing is. A collective.

    Each file is hashed once, by one of the ranks. Files that the manifest does not name are
    ignored.
    """
    faults = []
    try:
        manifest = read_manifest(folder)
        names = sorted(manifest.files)
        for name in names[collectives.rank() :: collectives.world_size()]:
            fault = _fault(folder / name, manifest.files[name])
            faults += [f"{name}: {fault}"] if fault else []
        if not any(fault.startswith(TRAINER) for fault in faults):
            read_trainer(folder)
    except PapoError as error:
        faults.append(str(error))
    return sorted(set(collectives.gather_lists(faults)))


def _fault(path: Path, entry: FileEntry) -> str | None:
    """How a file differs from its entry, None if it does not."""
    try:
        if not path.is_file():
            return "missing"
        size = path.stat().st_size
        if size != entry.size:
            return f"{size} bytes, expected {entry.size}"
        return None if sha256_of(path) == entry.sha256 else "its SHA-256 is another"
    except OSError as error:
        return f"unreadable ({error.strerror})"


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(ascii(part)[:60].strip("'") for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
