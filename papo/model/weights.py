"""Whether a loaded model's weights are all there, have its shapes, and are finite."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from papo.errors import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOATS = ("F64", "F32", "F16", "BF16")
_SAMPLE = 64  # about so many values of each tensor
_NOT_COMPUTED = ("dtype", "torch_dtype", "transformers_version", "attn_implementation")


def weight_faults(model: PreTrainedModel, report: Mapping[str, Any], path: str) -> list[str]:
    """What is wrong with loaded weights, whatever their values; empty if nothing is.

    transformers gives missing tensors random values: a run would train on them and learn nothing.

    Args:
        report: `from_pretrained`'s, without the tensors that the model's class allows to be
            missing.
        path: what the model was loaded from.
    """
    shapes = [
        f"{name} {list(stored)} instead of {list(expected)}"
        for name, stored, expected in report["mismatched_keys"]
    ]
    found = {
        "the file lacks": report["missing_keys"],
        "the file has unknown": report["unexpected_keys"],
        "other shapes in the file:": shapes,
    }
    faults = [f"{kind} {_some(names)}" for kind, names in found.items() if names]
    if faults:
        # A file of another architecture or size gives its tensors other names.
        advice = "config.json and the safetensors files do not belong to one model"
        return [*faults, f"{advice}; expected a folder as save_pretrained writes it"]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not embedding.weight:
        return [
            "config.json has tie_word_embeddings true, and the file a head that is not the "
            "embedding; expected false, or a file without the head"
        ]
    names = {name for name, _ in model.named_parameters()}
    if getattr(model.config, "quantization_config", None) is None:
        odd = [f"{n} ({t})" for n, t in _stored_dtypes(path) if n in names and t not in _FLOATS]
        if odd:
            return [
                f"no plain floating-point numbers in {_some(odd)}; expected {', '.join(_FLOATS)}"
            ]
    return []


def _stored_dtypes(path: str) -> Iterator[tuple[str, str]]:
    """Name and dtype of each tensor as stored: loading converts whatever it finds."""
    from transformers.utils import cached_file

    config = cached_file(path, "config.json")
    for file in sorted(Path(config).parent.glob("*.safetensors")) if config else ():
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a method, not a mapping)
                yield name, tensors.get_slice(name).get_dtype()


def fingerprint(model: PreTrainedModel) -> str:
    """Equal for two models that compute the same: of their configs, what ends a completion, and of
    names, shapes, dtypes, extremes and a sample of their weights.

    Raises:
        ValueError: some values are not finite; a few words name the tensors.
    """
    digest, bad = hashlib.sha256(repr(_computing(model)).encode()), []
    for name, p in model.named_parameters():
        extremes = _extremes(p.detach())
        bad += [] if all(map(math.isfinite, extremes)) else [name]
        sample = (p.detach().flatten()[:: 1 + p.numel() // _SAMPLE] + 0.0).tolist()
        digest.update(repr((name, tuple(p.shape), str(p.dtype), extremes, sample)).encode())
    if bad:
        raise ValueError(f"NaN or infinity in {_some(bad)}; expected finite weights")
    return digest.hexdigest()


def _computing(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a model's files say of how it computes and what ends a completion."""
    options = model.config.to_dict()
    told = sorted(
        (k, repr(v)) for k, v in options.items() if k[0] != "_" and k not in _NOT_COMPUTED
    )
    return told, getattr(model.generation_config, "eos_token_id", None)


def _extremes(tensor: Tensor) -> tuple[float, ...]:
    """Smallest and largest value, NaN if there is one; none of an empty tensor."""
    # aminmax needs no temporary of the tensor's size. Adding 0 turns -0 into 0.
    return tuple(float(x) + 0.0 for x in torch.aminmax(tensor)) if tensor.numel() else ()


def _some(names: Iterable[str]) -> str:
    return listed(sorted(names), 3)
