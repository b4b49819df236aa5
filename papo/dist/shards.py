"""A checkpoint's tensors: flat slices of the parameters in safetensors files of bounded size.

The key of a tensor says which slice it is, `exp_avg/model.norm.weight[0:32]`, so that any number of
ranks can read what any other number wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from papo.dist.manifest import FileEntry, entry_of
from papo.errors import PapoError, first_line, listed
from papo.outputs import sync

SHARD_BYTES = 1 << 27
WEIGHT = "weight"
_KEY = re.compile(r"(\w+)/(.+)\[(\d{1,18}):(\d{1,18})\]", re.DOTALL)


class ShardWriter:
    """Writes one rank's tensors of one part, holding SHARD_BYTES of them at most.

    Args:
        part: of the checkpoint, `weights` or `optimizer`.

    Attributes:
        entries: of the files written so far.
    """

    def __init__(self, folder: Path, part: str, rank: int, world: int) -> None:
        self.entries: dict[str, FileEntry] = {}
        self._folder, self._prefix = folder, f"{part}-{rank:05d}-of-{world:05d}"
        self._shard: dict[str, Tensor] = {}
        self._room = SHARD_BYTES

    def add(self, kind: str, name: str, start: int, values: Tensor) -> None:
        """Write the slice of `name` that begins at element `start`.

        Args:
            values: 1-D, float32 or bfloat16.

        Raises:
            OSError, SafetensorError: a file cannot be written.
        """
        while len(values):
            piece = values[: max(1, self._room // values.element_size())]
            # A view of live state would be saved with the storage around it.
            self._shard[f"{kind}/{name}[{start}:{start + len(piece)}]"] = piece.to("cpu", copy=True)
            self._room -= piece.numel() * piece.element_size()
            start, values = start + len(piece), values[len(piece) :]
            if self._room <= 0:
                self.flush()

    def flush(self) -> None:
        """Write what is held back; see `add`."""
        if not self._shard:
            return
        path = self._folder / f"{self._prefix}-{len(self.entries) + 1:05d}.safetensors"
        save_file(self._shard, str(path))
        sync(path)
        self.entries[path.name] = entry_of(path, list(self._shard))
        self._shard, self._room = {}, SHARD_BYTES


class _Slice(NamedTuple):
    start: int
    stop: int
    key: str
    file: str


class ShardReader:
    """Reads slices of the parameters from a checkpoint's files, one file at a time of each part.

    Args:
        files: of the manifest.

    Raises:
        PapoError: a key that names no slice.
    """

    def __init__(self, folder: Path, files: Mapping[str, FileEntry]) -> None:
        self._folder = folder
        self._open: dict[str, tuple[str, Any]] = {}
        self._slices: dict[tuple[str, str], list[_Slice]] = {}
        for file, entry in files.items():
            for key in entry.keys:
                match = _KEY.fullmatch(key)
                if match is None:
                    raise PapoError(f"{folder}: {file} has an unknown tensor {key[:80]!a}")
                found = _Slice(int(match[3]), int(match[4]), key, file)
                self._slices.setdefault((match[1], match[2]), []).append(found)
        for slices in self._slices.values():
            slices.sort()

    def kinds(self) -> set[str]:
        """What there is of the parameters: weights, masters, moments."""
        return {kind for kind, _ in self._slices}

    def check(self, kinds: set[str], numels: Mapping[str, int]) -> None:
        """Refuse what does not hold every element of every parameter once, or holds more.

        Raises:
            PapoError: it is of another model, or elements are missing or there twice.
        """
        expected = {(kind, name) for kind in kinds for name, numel in numels.items() if numel}
        missing = [f"{kind}/{name}" for kind, name in sorted(expected - self._slices.keys())]
        if missing:
            self._refuse(f"no tensor {listed(missing, 3)}: the checkpoint is of another model")
        unknown = [f"{kind}/{name}" for kind, name in sorted(self._slices.keys() - expected)]
        if unknown:
            self._refuse(f"unknown {listed(unknown, 3)}: the checkpoint is of another model")
        for (kind, name), slices in self._slices.items():
            reached = 0
            for found in slices:
                if found.start != reached or found.stop <= found.start:
                    self._refuse(
                        f"{found.key} in {found.file} follows element {reached} of {kind}/{name}; "
                        "expected every element once"
                    )
                reached = found.stop
            if reached != numels[name]:
                self._refuse(
                    f"{kind}/{name} has {reached} elements, the model's {name} {numels[name]}"
                )

    def read(
        self, kind: str, name: str, start: int, stop: int, dtypes: tuple[str, ...] = ("F32",)
    ) -> Iterator[tuple[int, Tensor]]:
        """(first element, values) of the slices that make up elements `start` to `stop`.

        Args:
            dtypes: what they may be stored as, in the words of safetensors.

        Raises:
            PapoError: a slice is not what its key says, or holds NaN or infinity.
        """
        for found in self._slices.get((kind, name), ()):
            begin, end = max(start, found.start), min(stop, found.stop)
            if begin < end:
                yield begin, self._piece(found, begin, end, dtypes)

    def _piece(self, found: _Slice, begin: int, end: int, dtypes: tuple[str, ...]) -> Tensor:
        try:
            stored = self._file(found.file).get_slice(found.key)
            shape, dtype = stored.get_shape(), stored.get_dtype()
            if shape != [found.stop - found.start] or dtype not in dtypes:
                self._refuse(f"{found.key} in {found.file} is {dtype} {shape}")
            values: Tensor = stored[begin - found.start : end - found.start]
        except PapoError:
            raise
        except Exception as error:  # safetensors wraps OSError in its own type
            raise PapoError(
                f"{self._folder}: {found.file}: {found.key}: {first_line(error)}"
            ) from error
        if not torch.isfinite(values).all():
            self._refuse(f"NaN or infinity in {found.key} of {found.file}; expected finite numbers")
        return values

    def _file(self, name: str) -> Any:
        """The open file; a mapped file counts as memory of the process, so the part's last one is
        closed."""
        part = name.partition("-")[0]
        if part not in self._open or self._open[part][0] != name:
            self._open[part] = name, safe_open(str(self._folder / name), framework="pt")
        return self._open[part][1]

    def _refuse(self, what: str) -> None:
        raise PapoError(f"{self._folder}: {what}")
