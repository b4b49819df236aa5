"""Rows as JSON files, Parquet files and Hugging Face `datasets` hold them."""

from __future__ import annotations

import codecs
import dataclasses
import glob
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from papo.errors import PapoError, first_line, shown, shown_path
from papo.inputs import file_fault

if TYPE_CHECKING:
    from papo.config import DataConfig

# A row may carry many MiB of tests, but a file without line ends must not fill the memory.
_LINE_BYTES = 64 << 20
_ARRAY_BYTES = 2 << 30  # an array is read whole
_LONGEST_PATH = 200
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
        rows: each with its place (file and line, or dataset, split and number). They are read as
            they are consumed, except for a JSON array, which is read whole. A row that cannot be
            read raises PapoError.
        schema: the Arrow schema; None for JSON.
    """

    rows: Iterator[tuple[str, Any]]
    schema: Any = None


def name_of(config: DataConfig, *, held_out: bool = False) -> str:
    """The option that training or held-out rows come from, with its value.

    Args:
        config: the config's `data` section, its source not `reasoning_gym`.
    """
    place = _place(config, held_out)
    if config.source == "huggingface":
        return f"data.dataset={shown(config.dataset)} split {shown(place)}"
    return f"data.{'eval' if held_out else 'train'}_path={shown(place, _LONGEST_PATH)}"


def _place(config: DataConfig, held_out: bool) -> str:
    """The file, or the split of a dataset, that training or held-out rows come from."""
    if config.source == "huggingface":
        place = config.eval_split if held_out else config.train_split
    else:
        place = config.eval_path if held_out else config.train_path
    assert place is not None  # required to train on; held-out ones are asked for only if given
    return place


def open_rows(config: DataConfig, *, held_out: bool = False) -> Rows:
    """The training rows, or the held-out ones.

    Args:
        config: the config's `data` section, its source not `reasoning_gym`.

    Raises:
        PapoError: no such file, or the Parquet file or the dataset cannot be opened.
    """
    what = name_of(config, held_out=held_out)
    place = _place(config, held_out)
    if config.source == "huggingface":
        return _dataset(config, place, what)
    file = _file(place, what)
    return _parquet(file, what) if config.source == "parquet" else Rows(_json_rows(file))


def head(config: DataConfig, *, held_out: bool = False) -> Iterator[tuple[str, Any]]:
    """The first rows of a file, which the library `datasets` would import torch to read.

    Args:
        config: the config's `data` section, its source `jsonl` or `parquet`.

    Raises:
        PapoError: as `open_rows`.
    """
    what = name_of(config, held_out=held_out)
    file = _file(_place(config, held_out), what)
    if config.source == "parquet":
        return _parquet_head(file, what)
    return _json_rows(file, first_alone=True)


def _file(place: str, what: str) -> Path:
    file = Path(place).expanduser()
    fault = file_fault(file)
    if fault is not None:
        advice = "; data.source=huggingface reads both" if file.is_dir() else ""
        raise PapoError(f"{what}: {fault}{advice}")
    return file


def _parquet_head(file: Path, what: str) -> Iterator[tuple[str, Any]]:
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as found:
            batch = next(found.iter_batches(batch_size=1), None)
            rows = [] if batch is None else batch.to_pylist()
    except Exception as error:  # damage, and kinds of columns that it cannot read
        raise PapoError(f"{what}: cannot be loaded: {_reason(error)}") from error
    return ((f"{what} row 1", row) for row in rows)


def _json_rows(path: Path, first_alone: bool = False) -> Iterator[tuple[str, Any]]:
    """(file and line, row) of a file of JSON lines, or (file and item, row) of one JSON array.

    Args:
        first_alone: read of an array, which is read as a whole, no more than one row needs.
    """
    first, name = True, shown_path(path)
    try:
        with path.open("rb") as file:
            _skip_mark(file, name)
            for number in itertools.count(1):
                line = file.readline(_LINE_BYTES + 1)
                if not line:
                    return
                if not line.strip():
                    continue
                if first and line.lstrip().startswith(b"["):
                    if first_alone:
                        yield from _array_head(line + file.read(_LINE_BYTES), name)
                        return
                    yield from _array_rows(line + file.read(_ARRAY_BYTES), name)
                    return
                first = False
                where = f"{name} line {number}"
                if len(line) > _LINE_BYTES:
                    raise PapoError(f"{where}: longer than {_LINE_BYTES >> 20} MiB: {_WANTED}")
                yield where, _parsed(line, where)
    except OSError as error:
        raise PapoError(f"{name}: cannot be read: {error.strerror or error}") from error


def _skip_mark(file: BinaryIO, name: str) -> None:
    """Skip the byte-order mark of UTF-8, and refuse what is not UTF-8 at all."""
    head = file.read(4)
    foreign = next((form for mark, form in _FOREIGN.items() if head.startswith(mark)), None)
    if foreign is not None:
        raise PapoError(f"{name}: {foreign}")
    file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)


def _array_rows(content: bytes, name: str) -> Iterator[tuple[str, Any]]:
    if len(content) > _ARRAY_BYTES:
        raise PapoError(
            f"{name}: an array of more than {_ARRAY_BYTES >> 20} MiB: write one object a line"
        )
    for number, row in enumerate(_parsed(content, name), start=1):
        yield f"{name} item {number}", row


def _array_head(content: bytes, name: str) -> Iterator[tuple[str, Any]]:
    """The first row of an array that may be cut off after it."""
    text = content.decode("utf-8", errors="replace")
    start = text.index("[") + 1
    start += len(text[start:]) - len(text[start:].lstrip())
    if text.startswith("]", start):
        return
    try:
        row, _ = json.JSONDecoder(object_pairs_hook=_object).raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise PapoError(f"{name} item 1: not JSON that can be read: {error}; {_WANTED}") from error
    yield f"{name} item 1", row


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_object)
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"key {shown(twice)} is given twice")
    return made


def _parquet(file: Path, what: str) -> Rows:
    def load(datasets: Any) -> Any:
        from pyarrow.parquet import read_metadata

        if read_metadata(file).num_rows == 0:  # streaming fails on it
            return datasets.Dataset.from_dict({})
        # Streamed: a copy in the cache would be of no use for a local file.
        return datasets.load_dataset(
            "parquet", data_files=glob.escape(str(file)), split="train", streaming=True
        )

    return _loaded(what, load)


def _dataset(config: DataConfig, split: str, what: str) -> Rows:
    """A split of a dataset: a folder (saved, or of files) or the hub's."""
    name = config.dataset
    assert name is not None  # DataConfig requires it
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
                f"data.dataset_config={shown(config.dataset_config)}: {folder} is a saved dataset, "
                "which has no configs"
            )
        return _loaded(what, lambda datasets: _saved(datasets.load_from_disk(str(folder)), split))
    path = str(folder) if folder.is_dir() else name
    return _loaded(
        what, lambda datasets: datasets.load_dataset(path, config.dataset_config, split=split)
    )


def _saved(found: Any, split: str) -> Any:
    """A split of what `save_to_disk` wrote: several named splits, or one without a name."""
    if not isinstance(found, dict):
        if split == "train":
            return found
        raise ValueError("the folder holds one unnamed split, which is train")
    if split not in found:
        raise ValueError(f"no such split; it has {', '.join(found)}")
    return found[split]


def _loaded(what: str, load: Callable[[Any], Any]) -> Rows:
    """The rows of what `load` returns, given the library; they stay in memory-mapped Arrow
    files."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = load(datasets).with_format(None)
        for name, feature in found.features.items():
            undecoded = _undecoded(feature, (datasets.Image, datasets.Audio, datasets.Video))
            if undecoded != feature:  # decoders may be missing, and nothing here needs them
                found = found.cast_column(name, undecoded)
    except Exception as error:  # no network, no such dataset, split or config, and so on
        raise PapoError(f"{what}: cannot be loaded: {_reason(error)}") from error
    finally:
        if not hidden:
            datasets.enable_progress_bars()
    labels = {n: f for n, f in found.features.items() if isinstance(f, datasets.ClassLabel)}
    return Rows(_numbered(found, labels, what), found.features.arrow_schema)


def _undecoded(feature: Any, media: tuple[Any, ...]) -> Any:
    """A column's type with `media`, at any depth, left as the stored bytes or path."""
    if isinstance(feature, dict):
        return {name: _undecoded(inner, media) for name, inner in feature.items()}
    if hasattr(feature, "feature"):  # a list of them
        inner: Any = _undecoded(feature.feature, media)
        return dataclasses.replace(feature, feature=inner)
    return type(feature)(decode=False) if isinstance(feature, media) else feature


def _numbered(
    found: Iterable[Any], labels: Mapping[str, Any], what: str
) -> Iterator[tuple[str, Any]]:
    """Rows with their places; `labels` maps columns of label numbers to what gives their names."""
    number = 0
    try:
        for number, row in enumerate(found, start=1):
            named = {
                column: None if row[column] in (None, -1) else label.int2str(row[column])
                for column, label in labels.items()
            }
            yield f"{what} row {number}", {**row, **named}
    except Exception as error:  # damage shows only where the file is damaged
        raise PapoError(f"{what}: cannot be read after row {number}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first lines of `error` and of its causes."""
    reasons, cause = [first_line(error)], error.__cause__
    while cause is not None and len(reasons) < 4:
        reasons.append(first_line(cause))
        cause = cause.__cause__
    return ": ".join(reasons)
