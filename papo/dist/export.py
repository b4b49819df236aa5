"""A checkpoint's weights as an ordinary Hugging Face folder.

python -m papo.dist.export runs/papo/checkpoints/step-00000010 my-model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from papo.config import ModelConfig
from papo.dist.folders import open_partial, remove, replace_folder
from papo.dist.manifest import read_manifest, read_trainer, verify
from papo.dist.shards import WEIGHT, ShardReader
from papo.errors import PapoError, first_line, listed, one_line
from papo.model.load import load_causal_lm, load_tokenizer
from papo.model.quiet import quiet
from papo.outputs import sync

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def write_model(
    folder: Path,
    model: PreTrainedModel,
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a model's folder whole or not at all; an earlier one is replaced.

    Raises:
        PapoError: it cannot be written.
    """
    partial = None
    try:
        partial = open_partial(folder)
        with quiet():
            model.save_pretrained(partial)
        generation.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        replace_folder(partial, folder)
        sync(folder.parent)
    except Exception as error:  # safetensors wraps OSError in its own type
        if partial is not None:
            remove(partial)
        raise PapoError(
            f"cannot save {folder}: {first_line(error)}; free some space or check that the folder "
            "is writable"
        ) from error


def export(checkpoint: Path, folder: Path, trust_remote_code: bool = False) -> None:
    """Make a model's folder of a checkpoint, one without the optimizer's part too.

    What is not trained, the tokenizer and the generation config come from the `model.path` that the
    checkpoint names. The weights are in the dtype that the run computed in, as `final/` has them.

    Args:
        trust_remote_code: run the code that the model's folder brings. What the checkpoint says
            about it is ignored: a file must not decide that.

    Raises:
        PapoError: the checkpoint is damaged or of another model than it names, or the folder is not
            empty or cannot be written.
    """
    faults = verify(checkpoint)
    if faults:
        raise PapoError(f"{checkpoint}: damaged: {listed(faults, 3)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PapoError(f"{folder}: expected a new or an empty folder")
    state = read_trainer(checkpoint)
    try:
        recorded = ModelConfig.model_validate((state.model_extra or {})["config"]["model"])
    except (KeyError, TypeError, ValidationError) as error:
        raise PapoError(f"{checkpoint}: its trainer.json has no config of a model") from error
    config = recorded.model_copy(update={"trust_remote_code": trust_remote_code})
    model: Any
    model, _ = load_causal_lm(config)
    if config.dtype == "bf16":
        model.to(torch.bfloat16)
    _fill(model, checkpoint)
    write_model(folder, model, model.generation_config, load_tokenizer(config))


def _fill(model: PreTrainedModel, checkpoint: Path) -> None:
    """Set the trained parameters of `model`, a slice at a time."""
    parameters = dict(model.named_parameters())
    shapes = read_trainer(checkpoint).shapes
    other = [n for n, s in shapes.items() if n not in parameters or s != [*parameters[n].shape]]
    if other:
        raise PapoError(
            f"{checkpoint}: {listed(other, 3)} is not in the model of its config, or has another "
            "shape there"
        )
    reader = ShardReader(checkpoint, read_manifest(checkpoint).files)
    for name in shapes:
        values = parameters[name].data.view(-1)
        for start, piece in reader.read(WEIGHT, name, 0, len(values), ("F32", "BF16")):
            values[start : start + len(piece)].copy_(piece)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 after an error, which is one line."""
    parser = argparse.ArgumentParser(prog="papo.dist.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a run's checkpoints/step-NNNNNNNN")
    parser.add_argument("folder", type=Path, help="the model folder to make")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    args = parser.parse_args(argv)
    try:
        export(args.checkpoint, args.folder, args.trust_remote_code)
    except (PapoError, OSError) as error:  # such as a name that is too long
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
