"""Whether the weights of a loaded model are all there, of its shapes, and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_FLOATS = ("F64", "F32", "F16", "BF16")


def weight_faults(model: Any, report: Mapping[str, Any], path: str) -> list[str]:
    """What is wrong with loaded weights, empty where nothing is.

    What is missing has random weights now: a run would train, and learn nothing.

    Args:
        report: `from_pretrained`'s, without what the model's class itself lets be missing.
        path: what it was loaded from.
    """
    shapes = [
        f"{name} {list(stored)} instead of {list(expected)}"
        for name, stored, expected in report["mismatched_keys"]
    ]
    told = {
        "the file lacks": report["missing_keys"],
        "the file has unknown": report["unexpected_keys"],
        "other shapes in the file:": shapes,
    }
    faults = [f"{kind} {_some(names)}" for kind, names in told.items() if names]
    if faults:
        # A file of another architecture or size names its tensors otherwise.
        advice = "config.json and the safetensors files are not of one model"
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
    bad = [name for name, p in model.named_parameters() if not _finite(p.detach())]
    return [f"NaN or infinity in {_some(bad)}; expected finite weights"] if bad else []


def _stored_dtypes(path: str) -> Iterator[tuple[str, str]]:
    """Name and dtype of the stored tensors: loading converts whatever it finds."""
    from transformers.utils import cached_file

    config = cached_file(path, "config.json")
    for file in sorted(Path(config).parent.glob("*.safetensors")) if config else ():
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a method, not a mapping)
                yield name, tensors.get_slice(name).get_dtype()


def _finite(tensor: Tensor) -> bool:
    # Without a temporary of the tensor's size.
    return tensor.numel() == 0 or all(math.isfinite(x) for x in torch.aminmax(tensor))


def _some(names: Iterable[str], shown: int = 3) -> str:
    first, *rest = sorted(names)
    more = f" and {len(rest) + 1 - shown} more" if len(rest) >= shown else ""
    return ", ".join([first, *rest][:shown]) + more
