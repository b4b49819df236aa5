"""What the ranks do in test_checkpoint: `python -m tests.distributed.checkpoint_tasks <json>`."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import deepspeed
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from papo.config import OptimConfig
from papo.dist import checkpoint, collectives, shards
from papo.dist.engine import Engine
from papo.dist.folders import Retention, resolve
from papo.dist.manifest import name_of, verify
from papo.errors import PapoError
from papo.policy.batch import TrainingSequence
from papo.policy.module import Policy
from tests.distributed import tasks
from tests.distributed.average_tasks import average, fold, whole
from tests.distributed.average_tasks import run_average as run_average
from tests.distributed.tasks import (
    VOCABULARY,
    Loss,
    ds_config,
    make_engine,
    model,
    my_part,
    one_update,
    sequences,
    whole_weights,
)
from tests.trainer.tiny import build_tokenizer

KEEP = Retention(2)


def saved(
    folder: str, step: int, e: Engine, weights: Literal["fp32", "bf16"] = "fp32"
) -> dict[str, str]:
    """Save; the digest of each whole tensor that is now in the checkpoint's files."""
    checkpoint.save(Path(folder), step, e, {"cursor": 5}, KEEP, weights)
    return digests(Path(folder) / name_of(step)) if collectives.rank() == 0 else {}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 by kind and name, however the tensors are cut."""
    slices: dict[str, dict[int, bytes]] = {}
    for path in folder.glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            name, _, where = key.rpartition("[")
            content = tensor.view(torch.uint8).numpy().tobytes()
            slices.setdefault(name, {})[int(where.split(":")[0])] = content
    return {
        name: hashlib.sha256(b"".join(parts[start] for start in sorted(parts))).hexdigest()
        for name, parts in slices.items()
    }


def run_save(
    folder: str,
    stage: int,
    tied: bool,
    split: list[int],
    dtype: str = "fp32",
    weights: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, Any]:
    """Two updates, each after a gradient that is averaged, a checkpoint, a third of both."""
    e = make_engine(stage, tied, dtype)
    part = my_part(sequences(sum(split)), split)
    for _ in range(2):
        fold(e, 1)
        one_update(e, part, 4, Loss(), True)
    before = whole_weights(e)
    state = saved(folder, 2, e, weights)
    assert whole_weights(e) == before
    return {**third(e, part), "state": state}


def third(e: Engine, part: list[TrainingSequence]) -> dict[str, Any]:
    """Fold and update once more; what came of it."""
    fold(e, 2)
    one_update(e, part, 4, Loss(), True)
    return {
        "average": whole(e, average(e)).tolist(),
        "weights": whole_weights(e),
        "steps": e.optimizer_steps,
    }


def run_load(
    folder: str,
    stage: int,
    tied: bool,
    split: list[int],
    dtype: str = "fp32",
    weights: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, Any]:
    """Load what `run_save` saved, save it again beside it, then the third update."""
    e = make_engine(stage, tied, dtype)
    part = my_part(sequences(sum(split)), split)
    fold(e, 3)  # so that there is an average to be replaced
    one_update(e, part, 4, Loss(), False)  # so that there are moments to be filled
    found = resolve("auto", Path(folder))
    assert found is not None
    state = checkpoint.load(found, e)
    again = saved(f"{folder}-again", 2, e, weights)
    return {**third(e, part), "cursor": state["cursor"], "state": again}


def run_share(folder: str, stage: int, dtype: str, bucket: int) -> dict[str, Any]:
    """Bytes of what passes through a checkpoint: whole, a rank's share, the largest tensor that is
    written or read, the largest tensor of numbers that a collective carries."""
    e = make_engine(stage, False, dtype)
    part = my_part(sequences(8), [4, 4])
    one_update(e, part, 4, Loss(), True)
    written, read, carried = [0], [0], [0]

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes if value.is_floating_point() else 0
        return sum(map(size, value)) if isinstance(value, (list, tuple)) else 0

    def noting(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            carried.append(max(map(size, (*args, *options.values())), default=0))
            return function(*args, **options)

        return call

    def save_file(shard: dict[str, torch.Tensor], path: str) -> None:
        written.append(sum(t.nbytes for t in shard.values()))
        real_save(shard, path)

    def piece(*args: Any) -> torch.Tensor:
        values = real_piece(*args)
        read.append(values.nbytes)
        return values

    real_save, real_piece = shards.save_file, shards.ShardReader._piece
    collective = re.compile(r"all_?gather|broadcast|all_?reduce|reduce|scatter|send")
    with contextlib.ExitStack() as stack:
        for module in (torch.distributed, torch.distributed.distributed_c10d, deepspeed.comm):
            for name in dir(module):
                if collective.match(name) and inspect.isfunction(getattr(module, name)):
                    noted = noting(getattr(module, name))
                    stack.enter_context(mock.patch.object(module, name, noted))
        stack.enter_context(mock.patch.object(shards, "SHARD_BYTES", bucket))
        stack.enter_context(mock.patch.object(shards, "save_file", save_file))
        stack.enter_context(mock.patch.object(shards.ShardReader, "_piece", piece))
        checkpoint.save(Path(folder), 1, e, {}, KEEP)
        checkpoint.load(Path(folder) / name_of(1), e)
        quiet = max(carried)
        with e.inference_model():
            pass
    return {
        "files": len(written) - 1,
        "written": max(written),
        "read": max(read),
        "carried": quiet,
        "seen by the test": max(carried),
    }


def run_full_disk(folder: str, failing: int) -> str:
    """A checkpoint that fits, then one that does not on one rank; what every rank is told."""

    def full(tensors: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    e = make_engine()
    one_update(e, sequences(2), 4, Loss(), True)
    checkpoint.save(Path(folder), 1, e, {}, KEEP)
    broken = full if collectives.rank() == failing else shards.save_file
    with mock.patch.object(shards, "save_file", broken):
        try:
            checkpoint.save(Path(folder), 2, e, {}, KEEP)
        except PapoError as error:
            return str(error)
    return ""


def run_unshared(folder: str) -> str:
    """Ranks that do not see each other's files, as nodes with a disk each; what all are told."""
    e = make_engine()
    one_update(e, sequences(2), 4, Loss(), True)
    try:
        checkpoint.save(Path(folder) / str(collectives.rank()), 1, e, {}, KEEP)
    except PapoError as error:
        return str(error)
    return ""


def run_damaged(folder: str) -> dict[str, Any]:
    """`auto` past a newest checkpoint whose file is cut, and one with NaN that its digest hides."""
    e = make_engine()
    one_update(e, sequences(2), 4, Loss(), True)
    for step in (1, 2):
        checkpoint.save(Path(folder), step, e, {}, KEEP)
    newest = Path(folder) / name_of(2)
    if collectives.rank() == 0:
        path = sorted(newest.glob("optimizer-*"))[-1]
        path.write_bytes(path.read_bytes()[:-1])
    collectives.gather_objects(0)
    faults = verify(newest)
    found = resolve("auto", Path(folder))
    assert found is not None
    if collectives.rank() == 0:
        path = sorted(found.glob("weights-*"))[-1]
        spoiled = {key: t.fill_(torch.nan) for key, t in load_file(path).items()}
        save_file(spoiled, path)
    collectives.gather_objects(0)
    try:
        checkpoint.load(found, e)
    except PapoError as error:
        return {"faults": faults, "found": found.name, "told": str(error)}
    return {}


def run_export(folder: str, tied: bool, dtype: str) -> dict[str, Any]:
    """`final/` after an update, beside the model that sampled."""
    e = Engine(Policy(model(tied), temperature=1.0), ds_config(3, dtype), OptimConfig(lr=1e-2))
    one_update(e, my_part(sequences(8), [4, 4]), 4, Loss(), True)
    base = Path(f"{folder}-base")
    if collectives.rank() == 0:
        model(tied).save_pretrained(base)
        build_tokenizer().save_pretrained(base)
    recorded = {"config": {"model": {"path": str(base), "dtype": dtype}}}
    checkpoint.save(Path(f"{folder}-checkpoints"), 1, e, recorded, KEEP, "bf16")
    checkpoint.export(Path(folder), e, SimpleNamespace(save_pretrained=lambda folder: None))
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = torch.arange(VOCABULARY)[None]
    with e.inference_model() as whole, torch.no_grad():
        same = torch.equal(whole(ids).logits, again(ids).logits)
        start = model(tied).get_input_embeddings().weight
        moved = not torch.equal(whole.get_input_embeddings().weight, start.to(whole.dtype))
    with safe_open(str(Path(folder) / "model.safetensors"), framework="pt") as file:
        names = list(file.keys())
    return {
        "same": same,
        "moved": moved,
        "dtype": str(again.dtype),
        "head": "lm_head.weight" in names,
    }


if __name__ == "__main__":
    tasks.main(globals())
