"""The folder of a run's checkpoints: which are there, and which of them stay.

checkpoints/step-00000010/      appears by one rename, so it is whole or was damaged later
checkpoints/.partial-*          what a killed process was writing or deleting
checkpoints/damaged-step-*      what a run fell back past; nothing here deletes it
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from papo.dist import collectives
from papo.dist.manifest import (
    OTHER_FORMAT,
    TrainerState,
    read_manifest,
    read_trainer,
    step_of,
    verify,
    write_manifest,
)
from papo.errors import PapoError, listed

log = logging.getLogger(__name__)


class Retention(NamedTuple):
    """How many of the newest checkpoints stay, and how many besides for their score."""

    keep: int
    keep_best: int = 0


def completed(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the finished checkpoints, oldest first; damaged ones are among them."""
    if not root.is_dir():
        return []
    found = ((step_of(path.name), path) for path in root.iterdir())
    return sorted((step, path) for step, path in found if step is not None and path.is_dir())


def resolve(resume: str, root: Path) -> Path | None:
    """The folder to resume from: `auto` is the newest intact one in `root`, `never` is None. A
    collective.

    Damaged ones that `auto` passes by get another name, so that the run may write their steps
    again. Where `root` has no checkpoint at all `auto` is None.

    Raises:
        PapoError: a named folder is no checkpoint, damaged, or without the optimizer's part; or
            `auto` finds checkpoints and none that is whole.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return _newest_intact(root)
    folder = Path(resume)
    is_there = all(collectives.gather_objects(os.path.isdir(resume)))
    if not is_there:
        raise PapoError(f"resume={resume!r}: no checkpoint there; expected a checkpoint's folder")
    if (folder / root.name).is_dir():
        raise PapoError(
            f"resume={resume!r}: the folder of a run; expected one of its {root.name}, or "
            "--resume auto with its output_dir"
        )
    faults = _verified(folder)
    if faults:
        raise PapoError(
            f"resume={resume!r}: damaged: {listed(faults, 3)}; expected an intact checkpoint, "
            "which --resume auto looks for"
        )
    if not read_manifest(folder).resumable:
        raise PapoError(
            f"resume={resume!r}: it was kept for its score and holds weights alone; expected a "
            "checkpoint with the optimizer's part"
        )
    return folder


def _verified(folder: Path) -> list[str]:
    """`verify`, and a line that says why the run waits."""
    log.info("verifying %s", folder)
    return verify(folder)


def _newest_intact(root: Path) -> Path | None:
    found = collectives.gather_objects(completed(root))[0]
    damaged: list[tuple[Path, str]] = []
    for _, folder in reversed(found):
        faults = _verified(folder)
        if faults and faults[0].startswith(OTHER_FORMAT):
            raise PapoError(f"{folder}: {faults[0]}")
        if faults:
            damaged.append((folder, listed(faults, 3)))
        elif read_manifest(folder).resumable:
            _set_aside(damaged)
            return folder
    if not found:
        return None
    told = "; ".join(f"{folder.name}: {faults}" for folder, faults in damaged)
    raise PapoError(
        f"resume='auto': no checkpoint in {root} can be resumed ({told or 'weights alone'}); "
        "--resume never starts over"
    )


def _set_aside(damaged: list[tuple[Path, str]]) -> None:
    """Give damaged checkpoints a name under which they are none."""
    for folder, faults in damaged:
        log.warning("%s is damaged: %s", folder, faults)
    failure = None
    if collectives.rank() == 0:
        try:
            for folder, _ in damaged:
                os.rename(folder, _free(folder.with_name(f"damaged-{folder.name}")))
        except OSError as error:
            failure = f"cannot rename {folder}, which is damaged: {error.strerror}"
    collectives.raise_together(failure)


def _free(path: Path) -> Path:
    """`path`, or the first of path.1, path.2 and so on that does not exist."""
    numbered = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not os.path.lexists(p))


def discard_after(root: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a run that goes on from `step` writes again."""
    for later, folder in completed(root):
        if later > step:
            remove(folder)


def sweep(root: Path, name: str = "") -> None:
    """Remove what killed processes left of the folders in `root`, whose names begin with `name`."""
    for left in root.glob(f".partial-{name}*"):
        _delete(left)


def open_partial(path: Path) -> Path:
    """Make the empty folder that becomes `path`.

    Raises:
        OSError: it cannot be made.
    """
    partial = _free(path.with_name(f".partial-{path.name.removeprefix('step-')}"))
    partial.mkdir(parents=True)
    return partial


def replace_folder(partial: Path, path: Path) -> None:
    """Make `partial` visible as `path`, whatever is there.

    Raises:
        OSError: it cannot be renamed.
    """
    if os.path.lexists(path):
        remove(path)
    os.rename(partial, path)


def remove(path: Path) -> None:
    """Remove a folder or file: at once from sight, then from disk; left as it is where it cannot
    be."""
    try:
        hidden = _free(path.with_name(f".partial-{path.name}"))
        os.rename(path, hidden)
    except OSError:
        return
    _delete(hidden)


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        try:
            path.unlink()
        except OSError:
            return
    else:
        shutil.rmtree(path, ignore_errors=True)


def rotate(root: Path, retention: Retention) -> None:
    """Remove what `retention` does not keep.

    The newest checkpoint stays whatever it is. Those of steps that taught nothing count for
    nothing. The best beyond the newest lose the optimizer's part. One that cannot be read is left
    alone.
    """
    folders = completed(root)
    states: dict[Path, TrainerState] = {}
    whole = []
    for _, folder in folders:
        try:
            whole += [folder] if read_manifest(folder).resumable else []
            states[folder] = read_trainer(folder)
        except PapoError as error:
            log.warning("%s is damaged: %s", folder, error)
    good = {f: state for f, state in states.items() if not state.bad_steps}
    newest = [f for f in whole if f in good][-retention.keep :]
    kept = {*newest, folders[-1][1]}
    scored = [(state.score, f) for f, state in good.items() if state.score is not None]
    beyond = sorted((score, f) for score, f in scored if f not in kept)  # of equals, the newer last
    best = {f for _, f in beyond[max(0, len(beyond) - retention.keep_best) :]}
    for folder in states.keys() - kept:
        if folder in best:
            _strip(folder)
        else:
            remove(folder)


def _strip(folder: Path) -> None:
    """Leave the weights alone."""
    try:
        manifest = read_manifest(folder)
        files = {n: e for n, e in manifest.files.items() if not n.startswith("optimizer-")}
        kept = manifest.model_copy(update={"resumable": False, "files": files})
        if manifest.resumable:
            write_manifest(folder, kept)
        for path in folder.glob("optimizer-*"):
            path.unlink()
    except OSError as error:
        log.warning("%s keeps its optimizer part: %s", folder, error.strerror)
