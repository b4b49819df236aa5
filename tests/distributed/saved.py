"""A checkpoint of a few numbers, saved in milliseconds without a process group."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from papo.dist import checkpoint
from papo.dist.average import GradientAverage
from papo.dist.folders import Retention
from papo.dist.manifest import (
    FORMAT,
    TRAINER,
    Manifest,
    entry_of,
    name_of,
    read_manifest,
    write_manifest,
)
from papo.dist.partition import MOMENTS, ReplicatedPartition

FILES = (
    "weights-00000-of-00001-00001.safetensors",
    "optimizer-00000-of-00001-00001.safetensors",
    "trainer.json",
    "manifest.json",
)


def one_line(fault: str) -> bool:
    """Whether a user can read it."""
    return "\n" not in fault and fault.isprintable() and len(fault) < 400


def without_tensors(folder: Path, **state: Any) -> Path:
    """A finished checkpoint of no parameters, whose trainer.json has `state` besides."""
    step = int(folder.name.removeprefix("step-"))
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"step": step, "optimizer_steps": 0, "shapes": {}, **state}
    (folder / TRAINER).write_text(json.dumps(meta))
    files = {TRAINER: entry_of(folder / TRAINER, [])}
    write_manifest(folder, Manifest(format=FORMAT, resumable=True, files=files))
    return folder


class SmallEngine:
    """Enough of an engine to save and load: two parameters, in float32 without ZeRO."""

    def __init__(self, seed: int = 0, shape: tuple[int, ...] = (3, 4)) -> None:
        g = torch.Generator().manual_seed(seed)
        self.optimizer_steps = 1
        self.computes_in_bf16 = False
        self.has_moments = True
        self.average = GradientAverage(torch.float32, torch.device("cpu"))
        self.parameters = {
            "a.weight": torch.nn.Parameter(torch.randn(shape, generator=g)),
            "b": torch.nn.Parameter(torch.randn(5, generator=g)),
        }
        self.moments = {
            id(p): {kind: torch.rand(p.shape, generator=g) for kind in MOMENTS}
            for p in self.parameters.values()
        }

    def trained_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.parameters.items())

    @property
    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.parameters.items()}

    def partition(self, parameter: torch.nn.Parameter) -> ReplicatedPartition:
        moments = self.moments[id(parameter)] if self.has_moments else {}
        return ReplicatedPartition(parameter, moments, 0, 1)

    def state(self) -> list[torch.Tensor]:
        """Every number of it."""
        weights = list(self.parameters.values())
        return [*weights, *(m for p in weights for m in self.moments[id(p)].values())]


def save(root: Path, step: int, engine: Any = None, **trainer: Any) -> Path:
    """Save `step` beside what is there; its folder."""
    keep = trainer.pop("retention", Retention(100))
    checkpoint.save(root, step, engine or SmallEngine(), {"cursor": 3, **trainer}, keep)
    return root / name_of(step)


def sign(folder: Path, **changes: Any) -> None:
    """Make the manifest fit the files as they are now, as whoever means harm would."""
    manifest = read_manifest(folder)
    files = {}
    for name in manifest.files:
        path = folder / name
        keys = list(load_file(path)) if path.suffix == ".safetensors" else []
        files[name] = entry_of(path, keys)
    write_manifest(
        folder, Manifest(format=FORMAT, resumable=True, files=files).model_copy(update=changes)
    )


def sign_text(folder: Path, content: bytes) -> None:
    """A manifest of any content whose own digest is right."""
    digest = hashlib.sha256(content).hexdigest().encode()
    (folder / "manifest.json").write_bytes(b'{"sha256": "' + digest + b'", ' + content)


def edit_trainer(folder: Path, **changes: Any) -> None:
    """Change trainer.json and the manifest with it."""
    path = folder / "trainer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    sign(folder)


def edit_tensors(folder: Path, part: str, edit: Any) -> None:
    """Replace the tensors of a part by what `edit` makes of them, and the manifest with them."""
    (path,) = folder.glob(f"{part}-*")
    save_file({key: t.clone() for key, t in edit(load_file(path)).items()}, path)
    sign(folder)
