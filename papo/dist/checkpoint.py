"""Checkpoints: every rank writes and reads its own part, files are verified, nothing is gathered.

Independent of ZeRO stage and number of ranks, and free of pickles: nothing read here can run code.

    checkpoints/step-00000010/
        weights-00000-of-00002-00001.safetensors     weight/<name>[start:stop] of rank 0
        optimizer-00000-of-00002-00001.safetensors   exp_avg/..., exp_avg_sq/..., perhaps master/...
                                                     and entropy_gradient/...
        trainer.json                                 step, cursor, shapes, the parts of the trainer
        manifest.json                                size and SHA-256 of every file
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from papo.dist import collectives
from papo.dist.average import AVERAGE, GradientAverage
from papo.dist.engine import Engine
from papo.dist.export import write_model
from papo.dist.folders import Retention, open_partial, remove, replace_folder, rotate, sweep
from papo.dist.manifest import (
    FORMAT,
    TRAINER,
    FileEntry,
    Manifest,
    entry_of,
    name_of,
    read_manifest,
    read_trainer,
    write_manifest,
)
from papo.dist.partition import MASTER, MOMENTS, Partition, read_share
from papo.dist.shards import WEIGHT, ShardReader, ShardWriter
from papo.errors import PapoError
from papo.outputs import replace_file, sync

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    trainer: Mapping[str, Any],
    retention: Retention,
    weights: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Write the checkpoint of `step`, then remove what `retention` does not keep; a collective.

    Args:
        trainer: exact in JSON. `cursor` (data), `score` (held-out accuracy or None) and `bad_steps`
            (how many steps in a row taught nothing) have a meaning here.
        weights: `bf16` writes the weights as a bfloat16 model computes with them, and the masters
            to the optimizer's part; a float32 model has no others than its masters, and ignores it.

    Raises:
        PapoError: on every rank, when one could not write (disk full, no permission). What existed
            before is untouched.
    """
    final = root / name_of(step)
    partial, failure = final, None
    if collectives.rank() == 0:
        try:
            sweep(root)
            partial = open_partial(final)
        except OSError as error:
            failure = _explain(final, error)
    collectives.raise_together(failure)
    partial = root / collectives.gather_objects(partial.name)[0]
    files, failure = _write_tensors(partial, engine, weights)
    _raise_without(partial, failure)
    parts = dict(item for part in collectives.gather_objects(files) for item in part.items())
    if collectives.rank() == 0:
        meta = {
            "step": step,
            "optimizer_steps": engine.optimizer_steps,
            "averaged_gradients": engine.average.count,
            "shapes": engine.trained_shapes,
            **trainer,
        }
        failure = _finish(partial, final, meta, parts)
    _raise_without(partial, failure)
    if collectives.rank() == 0:
        rotate(root, retention)


def _write_tensors(
    folder: Path, engine: Engine, weights: str
) -> tuple[dict[str, FileEntry], str | None]:
    """Write this rank's part; the files, and what went wrong."""
    if not folder.is_dir():
        return {}, _not_shared(folder.parent)
    rank, world = collectives.rank(), collectives.world_size()
    weight_part, optimizer_part = (
        ShardWriter(folder, part, rank, world) for part in ("weights", "optimizer")
    )
    rounded = weights == "bf16" and engine.computes_in_bf16
    moments = MOMENTS if engine.has_moments else ()
    try:
        for name, parameter in engine.trained_parameters():
            partition = engine.partition(parameter)
            start = partition.share.start
            master = read_share(partition, MASTER)
            weight_part.add(WEIGHT, name, start, master.bfloat16() if rounded else master)
            if rounded:
                optimizer_part.add(MASTER, name, start, master)
            for kind in moments:
                optimizer_part.add(kind, name, start, read_share(partition, kind))
            if engine.average.count:
                average = engine.average.share(name, len(partition.share))
                optimizer_part.add(AVERAGE, name, start, average)
        weight_part.flush()
        optimizer_part.flush()
    except Exception as error:  # safetensors wraps OSError in its own type
        return {}, _explain(folder, error)
    return weight_part.entries | optimizer_part.entries, None


def _finish(
    partial: Path, final: Path, meta: dict[str, Any], files: dict[str, FileEntry]
) -> str | None:
    """Write what only rank 0 writes and make the checkpoint visible; what went wrong."""
    try:
        for name, entry in files.items():
            if not (partial / name).is_file() or (partial / name).stat().st_size != entry.size:
                return _not_shared(partial.parent)
        replace_file(partial / TRAINER, json.dumps(meta, indent=1).encode())
        files = {**files, TRAINER: entry_of(partial / TRAINER, [])}
        write_manifest(partial, Manifest(format=FORMAT, resumable=True, files=files))
        replace_folder(partial, final)
        sync(final.parent)
    except OSError as error:
        return _explain(final, error)
    return None


def _raise_without(partial: Path, failure: str | None) -> None:
    """Fail on every rank where one did, without leaving a partial folder."""
    try:
        collectives.raise_together(failure)
    except PapoError:
        if collectives.rank() == 0:
            remove(partial)
        raise


def _explain(path: Path, error: Exception) -> str:
    full = "No space left" in str(error) or getattr(error, "errno", None) == 28
    advice = (
        "free some space or set checkpoint.keep lower"
        if full
        else "check that the folder is writable"
    )
    return f"cannot save {path}: {error}; {advice}. Earlier checkpoints are intact"


def _not_shared(folder: Path) -> str:
    return (
        f"cannot save {folder}: a rank does not see the files that another wrote there; expected "
        "output_dir in a folder that all nodes share. Earlier checkpoints are intact"
    )


def load(folder: Path, engine: Engine, *, average: bool = True) -> dict[str, Any]:
    """Fill an engine whose optimizer state exists from a verified checkpoint; returns the trainer's
    part. A collective.

    Each rank reads what it holds. Moments that the checkpoint lacks, because nothing had been
    learned yet, become 0. An average of gradients that it lacks begins anew.

    Args:
        average: whether the run has a use for the average of gradients.

    Raises:
        PapoError: on every rank, where the checkpoint is of another model, elements are missing or
            there twice, or not finite.
    """
    meta: dict[str, Any] = {}
    with collectives.failing_together():
        meta = dict(read_trainer(folder))
        reader = ShardReader(folder, read_manifest(folder).files)
        _check(folder, reader, engine, meta)
        source = MASTER if MASTER in reader.kinds() else WEIGHT
        engine.average.clear()
        for name, parameter in engine.trained_parameters():
            partition = engine.partition(parameter)
            _fill(partition, reader, name, source)
            if average and meta["averaged_gradients"]:
                _fill_average(engine.average, partition.share, reader, name)
    engine.optimizer_steps = meta["optimizer_steps"]
    engine.average.count = meta["averaged_gradients"] if average else 0
    return meta


def _check(folder: Path, reader: ShardReader, engine: Engine, meta: dict[str, Any]) -> None:
    """Refuse the checkpoint of another model."""
    shapes = {name: list(shape) for name, shape in engine.trained_shapes.items()}
    for name, shape in shapes.items():
        found = meta["shapes"].get(name)
        if found is not None and found != shape:
            raise PapoError(
                f"{folder}: {name} has shape {tuple(found)}, the model's is {tuple(shape)}"
            )
    learned = MOMENTS if meta["optimizer_steps"] else ()
    averaged = (AVERAGE,) if meta["averaged_gradients"] else ()
    optional = {MASTER, *MOMENTS} & reader.kinds()
    numels = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    reader.check({WEIGHT, *learned, *averaged, *optional}, numels)


def _fill(partition: Partition, reader: ShardReader, name: str, source: str) -> None:
    """Set one parameter's masters, moments and compute weights on this rank.

    Args:
        source: where the float32 weights are, WEIGHT or MASTER.
    """
    for kind in (MASTER, *MOMENTS):
        values = partition.read(kind)
        stored = source if kind == MASTER else kind
        if stored not in reader.kinds():
            values.zero_()
        _read_into(
            values, partition.start, reader.read(stored, name, partition.start, partition.stop)
        )
        partition.write(kind, values)
    if len(partition.compute) > partition.stop - partition.start:
        compute = partition.compute
        _read_into(compute, 0, reader.read(source, name, 0, len(compute)))


def _fill_average(average: GradientAverage, share: range, reader: ShardReader, name: str) -> None:
    """Set this rank's elements of one parameter's average."""
    pieces = reader.read(AVERAGE, name, share.start, share.stop, ("F32", "BF16"))
    _read_into(average.share(name, len(share)), share.start, pieces)


def _read_into(
    values: torch.Tensor, first: int, pieces: Iterable[tuple[int, torch.Tensor]]
) -> None:
    """Set a parameter's elements from `first` on, by pieces with the places that they begin at."""
    for start, piece in pieces:
        values[start - first : start - first + len(piece)].copy_(piece)


def export(folder: Path, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write an ordinary Hugging Face folder with the weights that sampled; a collective.

    Raises:
        PapoError: on every rank, when rank 0 could not write.
    """
    failure = None
    with engine.inference_model() as model:
        if collectives.rank() == 0:
            generation = engine.policy.causal_lm.generation_config
            assert generation is not None
            sweep(folder.parent, folder.name)
            try:
                write_model(folder, model, generation, tokenizer)
            except PapoError as error:
                failure = str(error)
    collectives.raise_together(failure)
