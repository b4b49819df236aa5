"""Checkpoints: tensors by name in safetensors and one JSON file, made visible by a single rename.

Independent of ZeRO stage and number of ranks, and free of pickles: nothing read here can run code.

    checkpoints/step-00000010/
        state-00001.safetensors ...   weight/<name>, exp_avg/<name>, exp_avg_sq/<name>, float32
        trainer.json                  step, data cursor, phase, weighting, prediction, optimizer
                                      steps
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from papo.dist import collectives
from papo.dist.engine import MOMENTS, Engine
from papo.errors import PapoError
from papo.model.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
SHARD_BYTES = 1 << 27  # each is held in memory twice while it is written
_NAME = re.compile(r"step-(\d{8})")


class Retention(NamedTuple):
    """How many checkpoints are kept: the newest, and besides those of the best score."""

    keep: int
    keep_best: int


class Stateful(Protocol):
    """A part of the trainer whose state a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs, exact in JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""


def save(
    root: Path,
    step: int,
    engine: Engine,
    trainer: dict[str, Any],
    retention: Retention,
    weights: str,
) -> None:
    """Write `root/step-<step>`, then remove what is older than the newest `retention.keep`; a collective.

    Raises:
        PapoError: on every rank, when rank 0 could not write (disk full, no permission). What
            existed before is untouched.
    """
    final = root / f"step-{step:08d}"
    partial = root / f".partial-{step:08d}"
    tensors = _whole_tensors(engine)
    failure: str | None = None
    if collectives.rank() == 0:
        try:
            for killed in root.glob(".partial-*"):
                shutil.rmtree(killed, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            failure = _explain(partial, error)
    failure = _write_shards(partial, tensors, failure)
    if collectives.rank() == 0 and failure is None:
        try:
            meta = {
                "format": FORMAT,
                "step": step,
                "optimizer_steps": engine.optimizer_steps,
                **trainer,
            }
            _write_synced(partial / "trainer.json", json.dumps(meta, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            _sync_dir(root)
            for _, old in completed(root)[: -retention.keep]:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            failure = _explain(final, error)
    _clean_up(partial, failure)


def _clean_up(partial: Path, failure: str | None) -> None:
    """After a failure of rank 0, remove the partial folder and fail on every rank."""
    if failure is not None:
        shutil.rmtree(partial, ignore_errors=True)
    collectives.raise_together(failure)


def _whole_tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in engine.trained_parameters():
        for kind, tensor in engine.read_state(parameter).items():
            yield f"{kind}/{name}", tensor


def _write_shards(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], failure: str | None
) -> str | None:
    """All ranks gather, rank 0 writes; after a failure the gathering goes on without the writing."""
    shard: dict[str, Tensor] = {}
    size, index = 0, 0
    writing = collectives.rank() == 0

    def flush() -> None:
        nonlocal shard, size, index, failure
        if shard and failure is None:
            index += 1
            path = folder / f"state-{index:05d}.safetensors"
            try:
                save_file(shard, str(path))
                _sync_file(path)
            except Exception as error:  # safetensors wraps OSError in its own type
                failure = _explain(path, error)
        shard, size = {}, 0

    for name, tensor in tensors:
        if writing and failure is None:
            # The CPU backend's "whole" tensor may be a view of a reused buffer.
            shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
            size += shard[name].numel() * shard[name].element_size()
            if size >= SHARD_BYTES:
                flush()
    flush()
    return failure


def _explain(path: Path, error: Exception) -> str:
    full = "No space left" in str(error) or getattr(error, "errno", None) == 28
    advice = (
        "free some space or set checkpoint.keep lower"
        if full
        else "check that the folder is writable"
    )
    return f"cannot save {path}: {error}; {advice}. Earlier checkpoints are intact"


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_sync_dir = _sync_file


def completed(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the finished checkpoints, oldest first. Partial ones have another name."""
    if not root.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in root.iterdir() if (m := _NAME.fullmatch(p.name))]
    return sorted((step, p) for step, p in found if (p / "trainer.json").is_file())


def resolve(resume: str, root: Path) -> Path | None:
    """The folder to resume from: `auto` is the newest in `root`, if any, `never` is None.

    Raises:
        PapoError: a named folder that is not a finished checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = completed(root)
        return found[-1][1] if found else None
    folder = Path(resume)
    if not (folder / "trainer.json").is_file():
        raise PapoError(
            f"resume={resume!r}: no checkpoint there (expected a folder with trainer.json)"
        )
    return folder


def discard_after(root: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a run that goes on from `step` writes again."""
    for later, folder in completed(root):
        if later > step:
            shutil.rmtree(folder, ignore_errors=True)


def read_meta(folder: Path) -> dict[str, Any]:
    """The trainer's part of a checkpoint.

    Raises:
        PapoError: another format.
    """
    meta: dict[str, Any] = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    if meta.get("format") != FORMAT:
        raise PapoError(
            f"{folder}: checkpoint format {meta.get('format')!r}, this version reads {FORMAT}"
        )
    return meta


def load(folder: Path, engine: Engine) -> dict[str, Any]:
    """Fill an engine whose optimizer state exists; returns the trainer's part. A collective.

    Raises:
        PapoError: another format, a missing or a differently shaped tensor (another model).
    """
    meta = read_meta(folder)
    with contextlib.ExitStack() as stack:
        where: dict[str, safe_open] = {}
        for path in sorted(folder.glob("state-*.safetensors")):
            file = stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
            where.update(dict.fromkeys(file.keys(), file))
        for name, parameter in engine.trained_parameters():
            state = {}
            for kind in ("weight", *MOMENTS):
                key = f"{kind}/{name}"
                if key not in where:
                    raise PapoError(
                        f"{folder}: no tensor {key!r}: the checkpoint is of another model"
                    )
                state[kind] = where[key].get_tensor(key)
            found = tuple(state["weight"].shape)
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if found != shape:
                raise PapoError(f"{folder}: {name} has shape {found}, the model's is {shape}")
            engine.write_state(parameter, state)
    engine.optimizer_steps = meta["optimizer_steps"]
    return meta


def export(folder: Path, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write an ordinary Hugging Face folder with the weights that sampled; a collective.

    Raises:
        PapoError: on every rank, when rank 0 could not write.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    failure: str | None = None
    with engine.inference_model() as model:
        if collectives.rank() == 0:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                with quiet():
                    model.save_pretrained(partial)
                engine.policy.causal_lm.generation_config.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(partial, folder)
                _sync_dir(folder.parent)
            except Exception as error:  # safetensors wraps OSError in its own type
                failure = _explain(folder, error)
    _clean_up(partial, failure)
