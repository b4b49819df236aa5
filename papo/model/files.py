"""A model's folder: where it is, and what can be refused without torch and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from papo.errors import PapoError, first_line, listed, shown
from papo.inputs import file_fault, read_json_object
from papo.model.smollm2 import SMOLLM2, converted_smollm2

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "vocab.txt",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
)
_INDEX = "model.safetensors.index.json"
_JSON_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    _INDEX,
)
_JSON_BYTES = 64 << 20
# Kinds of models with a table of positions, and the name of its length in config.json.
_POSITIONS = {
    "gpt2": "n_positions",
    "gpt_bigcode": "n_positions",
    "gpt_neo": "max_position_embeddings",
    "opt": "max_position_embeddings",
}


def resolve_model_path(name: str) -> str:
    """What `from_pretrained` gets for `name`: the converted folder of `smollm2-135m`, an existing
    folder, or a hub id.

    Raises:
        PapoError: no such folder, or the package behind `smollm2-135m` is not installed.
    """
    if name == SMOLLM2:
        return str(converted_smollm2())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise PapoError(
                f"model.path={shown(name)}: the folder has no config.json; expected a Hugging Face "
                "model folder"
            )
        return str(path)
    looks_local = (
        path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists()
    )
    if looks_local:
        raise PapoError(
            f"model.path={shown(name)}: no such folder; expected {SMOLLM2}, a model folder or a "
            "hub id"
        )
    return name


def check_tokenizer(path: str, name: str) -> None:
    """Refuse a model's folder without a tokenizer; a hub id is left to the hub.

    Args:
        path: from `resolve_model_path`.
        name: `model.path`, for the message.

    Raises:
        PapoError: there is none.
    """
    folder = Path(path)
    if folder.is_dir() and not any(any(folder.glob(file)) for file in _TOKENIZER_FILES):
        raise PapoError(
            f"model.path={shown(name)}: the folder has no tokenizer (none of "
            f"{', '.join(_TOKENIZER_FILES[:3])}, ...); "
            "save one there with tokenizer.save_pretrained"
        )


def check_folder(folder: Path, name: str, max_new_tokens: int) -> None:
    """Refuse a model's folder with files that cannot be read, and completions that are longer than
    its table of positions.

    Args:
        name: `model.path`, for the message.

    Raises:
        PapoError: the first fault.
    """
    whose = f"model.path={shown(name)}"
    check_tokenizer(str(folder), name)
    for file in _JSON_FILES:
        if not (folder / file).exists():
            continue
        try:
            found = read_json_object(folder / file, _JSON_BYTES)
        except ValueError as error:
            raise PapoError(f"{whose}: {file}: {error}") from error
        if file == "config.json":
            _check_positions(found, max_new_tokens, whose)
        if file == _INDEX:
            _check_index(folder, found, whose)
    tensors = sorted(folder.glob("*.safetensors"))
    if not tensors:
        raise PapoError(
            f"{whose}: the folder has no safetensors file; expected one as save_pretrained writes "
            "it: other formats can run code"
        )
    for path in tensors:
        try:
            fault = file_fault(path)
            if fault is None:
                safe_open(str(path), framework="np").keys()
        except (SafetensorError, OSError, ValueError) as error:
            fault = first_line(error)
        if fault is not None:
            raise PapoError(f"{whose}: {path.name} is cut off or no safetensors file: {fault}")


def _check_positions(config: dict[str, Any], max_new_tokens: int, whose: str) -> None:
    positions = config.get(_POSITIONS.get(str(config.get("model_type")), ""))
    if isinstance(positions, int) and max_new_tokens >= positions:
        raise PapoError(
            f"rollout.max_new_tokens={max_new_tokens}: expected less than {positions}, the "
            f"positions that the model at {whose} has"
        )


def _check_index(folder: Path, index: dict[str, Any], whose: str) -> None:
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise PapoError(f"{whose}: {_INDEX}: expected weight_map, from tensors to files")
    lacking = sorted({f for f in files.values() if not (folder / Path(f).name).is_file()})
    if lacking:
        raise PapoError(f"{whose}: the folder lacks {listed(lacking, 3)}, which {_INDEX} names")
