"""What the ranks do in test_checkpoint: `python -m tests.distributed.checkpoint_tasks <json>`."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from papo.config import OptimConfig
from papo.dist import checkpoint
from papo.dist.engine import Engine
from papo.errors import PapoError
from papo.policy.module import Policy
from tests.distributed import tasks
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


def run_save(
    folder: str, stage: int, tied: bool, split: list[int], dtype: str = "fp32"
) -> dict[str, Any]:
    """Two updates, a checkpoint, a third update."""
    e = make_engine(stage, tied, dtype)
    part = my_part(sequences(sum(split)), split)
    for _ in range(2):
        one_update(e, part, 4, Loss(), True)
    checkpoint.save(Path(folder), 2, e, {"cursor": 5}, keep=2)
    one_update(e, part, 4, Loss(), True)
    return {"weights": whole_weights(e), "steps": e.optimizer_steps}


def run_load(
    folder: str, stage: int, tied: bool, split: list[int], dtype: str = "fp32"
) -> dict[str, Any]:
    """Load what `run_save` saved, then the third update."""
    e = make_engine(stage, tied, dtype)
    part = my_part(sequences(sum(split)), split)
    one_update(e, part, 4, Loss(), False)  # so that there are moments to be filled
    state = checkpoint.load(checkpoint.completed(Path(folder))[-1][1], e)
    one_update(e, part, 4, Loss(), True)
    return {"weights": whole_weights(e), "steps": e.optimizer_steps, "cursor": state["cursor"]}


def run_full_disk(folder: str) -> str:
    """A checkpoint that fits, then one that does not; what every rank is told."""

    def full(tensors: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    e = make_engine()
    one_update(e, sequences(2), 4, Loss(), True)
    checkpoint.save(Path(folder), 1, e, {}, keep=2)
    real, checkpoint.save_file = checkpoint.save_file, full  # rank 0 alone writes
    try:
        checkpoint.save(Path(folder), 2, e, {}, keep=2)
    except PapoError as error:
        return str(error)
    finally:
        checkpoint.save_file = real
    return ""


def run_export(folder: str, tied: bool, dtype: str) -> dict[str, Any]:
    """`final/` after an update, beside the model that sampled."""
    e = Engine(Policy(model(tied), temperature=1.0), ds_config(3, dtype), OptimConfig(lr=1e-2))
    one_update(e, my_part(sequences(8), [4, 4]), 4, Loss(), True)
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
