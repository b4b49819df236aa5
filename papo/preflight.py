"""What can be refused before torch is imported, which takes many seconds: files, folders, names."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import tempfile
from pathlib import Path

from papo import hub
from papo.config import DataConfig, TrainConfig
from papo.data.examples import first
from papo.data.generated import generate
from papo.errors import PapoError, first_line, shown
from papo.model import files
from papo.model.smollm2 import SMOLLM2, packaged_gguf


def check(config: TrainConfig) -> None:
    """Refuse what a run would stumble over later, the cheapest check first.

    Raises:
        PapoError: the checkpoint, a verifier's module, the run's folder, the model's files or the
            problems are not there or cannot be used.
    """
    _check_resume(config.resume)
    for name in config.reward.verifiers:
        _check_verifier(name)
    _check_writable(config.output_dir)
    _check_model(config.model.path, config.rollout.max_new_tokens)
    _check_problems(config.data)


def _check_resume(resume: str) -> None:
    if resume not in ("never", "auto") and not os.path.isdir(resume):
        raise PapoError(
            f"resume={shown(resume)}: no checkpoint there; expected never, auto or a checkpoint's "
            "folder"
        )


def _check_verifier(name: str) -> None:
    """Refuse a function of the user's whose package is neither installed nor in this folder."""
    module, colon, _ = name.partition(":")
    package = module.partition(".")[0]
    if not colon:
        return
    try:
        found = importlib.util.find_spec(package) or importlib.machinery.PathFinder.find_spec(
            package, [os.getcwd()]
        )
    except (ImportError, ValueError, OSError) as error:
        raise PapoError(f"reward.verifier={shown(name)}: {first_line(error)}") from error
    if found is None:
        raise PapoError(
            f"reward.verifier={shown(name)}: no module {package} on the path or in "
            f"{shown(os.getcwd())}"
        )


def _check_writable(output_dir: str) -> None:
    """Refuse a run's folder that cannot be made, or not be written to."""
    folder = Path(output_dir).absolute()
    try:
        nearest = next(f for f in (folder, *folder.parents) if os.path.lexists(f))
        fault = None if nearest.is_dir() else "is a file: expected a folder"
    except OSError as error:
        fault = error.strerror or first_line(error)
    if fault is None:
        try:
            tempfile.TemporaryDirectory(prefix=".papo-", dir=nearest).cleanup()
        except OSError as error:
            fault = f"cannot be written to ({error.strerror})"
    if fault is not None:
        raise PapoError(
            f"output_dir={shown(output_dir)}: {shown(str(nearest))} {fault}; "
            "choose another output_dir"
        )


def _check_model(name: str, max_new_tokens: int) -> None:
    if name == SMOLLM2:
        packaged_gguf()
        return
    path = Path(files.resolve_model_path(name))
    folder = path if path.is_dir() else hub.check_model(name)
    if folder is not None:
        files.check_folder(folder, name, max_new_tokens)


def _check_problems(data: DataConfig) -> None:
    """Make one problem of each file, or of the generator; ask whether a dataset is to be had."""
    assert data.dataset is not None or data.train_path is not None  # DataConfig requires one
    if data.source == "reasoning_gym":
        next(generate(str(data.dataset), data.params, data.split_seed))
    elif data.source == "huggingface":
        if not Path(str(data.dataset)).expanduser().exists():
            hub.check_dataset(str(data.dataset))
    else:
        for held_out in (False, True)[: 1 if data.eval_path is None else 2]:
            first(data, held_out=held_out)
