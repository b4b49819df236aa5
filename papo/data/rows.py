"""Rows of data as they are found: JSON, Parquet, and what Hugging Face `datasets` reads."""

from __future__ import annotations

import codecs
import dataclasses
import glob
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from papo.errors import PapoError, first_line

# A row may carry tests of many MiB; a file without line ends is not to fill the memory.
_LINE_BYTES = 64 << 20
_WANTED = "expected one JSON object a line, or one array of them"
_FOREIGN = {
    b"PAR1": "a Parquet file: set data.source=parquet",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    codecs.BOM_UTF32_LE: "UTF-32: convert it to UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16: convert it to UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16: convert it to UTF-8",
}


class Rows(NamedTuple):
    """What a file or a dataset holds.

    Attributes:
        rows: each with its place (file and line, or dataset, split and number), read as they are
            consumed, a JSON array whole; a place or a row that cannot be read raises PapoError.
        schema: the Arrow schema; None for JSON.
    """

    rows: Iterator[tuple[str, Any]]
    schema: Any = None


def name_of(config: Any, *, held_out: bool = False) -> str:
    """The option, with its value, that training or held-out rows come from.

    Args:
        config: the config's `data` section, its source not `reasoning_gym`.
    """
    if config.source == "huggingface":
        split = config.eval_split if held_out else config.train_split
        return f"data.dataset={config.dataset!r} split {split!r}"
    path = config.eval_path if held_out else config.train_path
    return f"data.{'eval' if held_out else 'train'}_path={path!r}"


def open_rows(config: Any, *, held_out: bool = False) -> Rows:
    """The training rows, or the held-out ones.

    Args:
        config: the config's `data` section, its source not `reasoning_gym`.

    Raises:
        PapoError: no such file, or the Parquet file or the dataset cannot be opened.
    """
    what = name_of(config, held_out=held_out)
    if config.source == "huggingface":
        return _dataset(config, config.eval_split if held_out else config.train_split, what)
    path = config.eval_path if held_out else config.train_path
    file = Path(path).expanduser()
    if file.is_dir():
        raise PapoError(f"{what}: is a folder: expected a file; data.source=huggingface reads both")
    if not file.exists():
        raise PapoError(f"{what}: no such file")
    return _parquet(file, what) if config.source == "parquet" else Rows(_json_rows(file))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, row) of a file of JSON lines, or (file and item, row) of one JSON array."""
    first = True
    try:
        with path.open("rb") as file:
            _skip_mark(file, path)
            for number in itertools.count(1):
                line = file.readline(_LINE_BYTES + 1)
                if not line:
                    return
                if not line.strip():
                    continue
                if first and line.lstrip().startswith(b"["):
                    yield from _array_rows(line + file.read(), path)
                    return
                first = False
                where = f"{path} line {number}"
                if len(line) > _LINE_BYTES:
                    raise PapoError(f"{where}: longer than {_LINE_BYTES >> 20} MiB: {_WANTED}")
                yield where, _parsed(line, where)
    except OSError as error:
        raise PapoError(f"{path}: cannot be read: {error.strerror or error}") from error


def _skip_mark(file: BinaryIO, path: Path) -> None:
    """Past UTF-8's byte-order mark, and no further into what is no UTF-8 at all."""
    head = file.read(4)
    foreign = next((name for mark, name in _FOREIGN.items() if head.startswith(mark)), None)
    if foreign is not None:
        raise PapoError(f"{path}: {foreign}")
    file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)


def _array_rows(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_parsed(content, str(path)), start=1):
        yield f"{path} item {number}", row


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise PapoError(f"{where}: byte 0x{byte:02x} is not UTF-8: convert the file") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} " if error.lineno > 1 else ""
        raise PapoError(
            f"{where}: not JSON: {error.msg} ({place}column {error.colno}); {_WANTED}"
        ) from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise PapoError(f"{where}: not JSON that can be read: {error}") from error


def _parquet(file: Path, what: str) -> Rows:
    def load(datasets: Any) -> Any:
        from pyarrow.parquet import read_metadata

        if read_metadata(file).num_rows == 0:  # streaming stumbles over it
            return datasets.Dataset.from_dict({})
        # Streamed: a copy in the cache would be worth nothing for a file that is here.
        return datasets.load_dataset(
            "parquet", data_files=glob.escape(str(file)), split="train", streaming=True
        )

    return _loaded(what, load)


def _dataset(config: Any, split: str, what: str) -> Rows:
    """A split of a dataset: a folder, saved or of files, or the hub's."""
    name = config.dataset
    folder = Path(name).expanduser()
    if folder.is_file():
        raise PapoError(
            f"{what}: is a file: give it as data.train_path with data.source=jsonl or parquet"
        )
    if not folder.exists() and name.startswith((".", "~", "/")):
        raise PapoError(f"{what}: no such folder; expected a folder or a hub id")
    if any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        if config.dataset_config is not None:
            raise PapoError(
                f"data.dataset_config={config.dataset_config!r}: {folder} is a saved dataset, "
                "which has no configs"
            )
        return _loaded(what, lambda datasets: _saved(datasets.load_from_disk(str(folder)), split))
    path = str(folder) if folder.is_dir() else name
    return _loaded(
        what, lambda datasets: datasets.load_dataset(path, config.dataset_config, split=split)
    )


def _saved(found: Any, split: str) -> Any:
    """The split of what `save_to_disk` wrote: a dataset of several, or one without a name."""
    if not isinstance(found, dict):
        if split == "train":
            return found
        raise ValueError("the folder holds one unnamed split, which is train")
    if split not in found:
        raise ValueError(f"no such split; it has {', '.join(found)}")
    return found[split]


def _loaded(what: str, load: Callable[[Any], Any]) -> Rows:
    """What `load`, given the library, returns; its rows stay in Arrow files mapped into memory."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = load(datasets).with_format(None)
        for name, feature in found.features.items():
            undecoded = _undecoded(feature, (datasets.Image, datasets.Audio, datasets.Video))
            if undecoded != feature:  # nobody asked for them, and decoders may be missing
                found = found.cast_column(name, undecoded)
    except Exception as error:  # no network, no such dataset, split or config, and more
        raise PapoError(f"{what}: cannot be loaded: {_reason(error)}") from error
    finally:
        if not hidden:
            datasets.enable_progress_bars()
    labels = {n: f for n, f in found.features.items() if isinstance(f, datasets.ClassLabel)}
    return Rows(_numbered(found, labels, what), found.features.arrow_schema)


def _undecoded(feature: Any, media: tuple[Any, ...]) -> Any:
    """A column's type with `media` as the bytes or the path they are stored as, at any depth."""
    if isinstance(feature, dict):
        return {name: _undecoded(inner, media) for name, inner in feature.items()}
    if hasattr(feature, "feature"):  # a list of them
        inner: Any = _undecoded(feature.feature, media)
        return dataclasses.replace(feature, feature=inner)
    return type(feature)(decode=False) if isinstance(feature, media) else feature


def _numbered(
    found: Iterable[Any], labels: Mapping[str, Any], what: str
) -> Iterator[tuple[str, Any]]:
    """`labels`: columns that hold a label's number, and what tells its name."""
    number = 0
    try:
        for number, row in enumerate(found, start=1):
            named = {
                column: None if row[column] in (None, -1) else label.int2str(row[column])
                for column, label in labels.items()
            }
            yield f"{what} row {number}", {**row, **named}
    except Exception as error:  # a damaged file shows only where it is damaged
        raise PapoError(f"{what}: cannot be read after row {number}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line of `error`, and of what caused it."""
    reason = first_line(error)
    return reason if error.__cause__ is None else f"{reason}: {_reason(error.__cause__)}"
