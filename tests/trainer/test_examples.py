"""Rows of files and datasets in every form, the fields of a problem, and the errors of rows that
hold none.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from papo.config import ConfigError, DataConfig, load_config
from papo.data import rows
from papo.data.examples import Example, read
from papo.errors import PapoError
from tests.trainer.tiny import MINIMAL

GSM8K = {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 1,072"}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "How many clips?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"index": 0, "split": "train"},
}
TRL = {
    "prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many clips?"},
    ],
    "solution": "72",
}
USER = ({"role": "user", "content": "How many clips?"},)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written outside the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def from_file(path: Path, content: object = None, **options) -> list[Example]:
    """The examples of a file of JSON, which `content` (text, bytes or rows) is written to first."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    if isinstance(content, str):
        content = content.encode()
    if content is not None:
        path.write_bytes(content)
    return list(read(DataConfig(source="jsonl", train_path=str(path), **options)))


def from_parquet(path: Path, content: list[dict], **options) -> list[Example]:
    datasets.Dataset.from_list(content).to_parquet(str(path))
    return list(read(DataConfig(source="parquet", train_path=str(path), **options)))


def from_dataset(dataset: object, *, held_out: bool = False, **options) -> list[Example]:
    config = DataConfig(source="huggingface", dataset=str(dataset), **options)
    return list(read(config, held_out=held_out))


def refusal(call, *args, **options) -> str:
    with pytest.raises(PapoError) as caught:
        call(*args, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


# ---- forms of a file ----------------------------------------------------------------------------

TWO = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
LINES = "".join(json.dumps(row) + "\n" for row in TWO).encode()


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.rstrip(),
        codecs.BOM_UTF8 + LINES,
        LINES.replace(b"\n", b"\r\n\r\n"),
        json.dumps(TWO).encode(),
        codecs.BOM_UTF8 + b"\n " + json.dumps(TWO, indent=2).encode(),
    ],
    ids=["lines", "no last line end", "byte-order mark", "CRLF", "array", "indented array"],
)
def test_json_of_every_form(tmp_path, content):
    found = from_file(tmp_path / "x.json", content)
    assert [(r.messages[0]["content"], r.answer) for r in found] == [("a", "1"), ("b", "2")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("".join(json.dumps(r) for r in TWO), "line 1: not JSON: Extra data"),
        ('{\n "prompt": "a"\n}', "line 1: not JSON: .*; expected one JSON object a line, or one"),
        ('[{"prompt": "a", "answer": 1},\n{"prompt"}]', r"not JSON: .* \(line 2 column 10\)"),
        ('[{"prompt": "a", "answer": 1}, 7]', "item 2: expected an object, got int"),
        ("[" * 100_000, "not JSON that can be read"),
        (LINES + '{"prompt": "é"}'.encode("latin-1"), "line 3: byte 0xe9 is not UTF-8"),
        (LINES.decode().encode("utf-16"), "UTF-16: convert it to UTF-8"),
        (gzip.compress(LINES, mtime=0), "compressed by gzip: unpack it first"),
        (b"PAR1....PAR1", "a Parquet file: set data.source=parquet"),
    ],
)
def test_what_is_no_json_is_one_line(tmp_path, content, expected):
    line = refusal(from_file, tmp_path / "x.json", content)
    assert line.startswith(str(tmp_path / "x.json")) and re.search(expected, line)


def test_folders_and_missing_files_are_one_line(tmp_path):
    line = refusal(from_file, tmp_path)
    assert line.startswith(f"data.train_path={str(tmp_path)!r}: is a folder: expected a file")
    missing = str(tmp_path / "none")
    for source in ("jsonl", "parquet"):
        config = DataConfig(source=source, train_path=missing)
        line = refusal(lambda c: list(read(c)), config)
        assert line == f"data.train_path={missing!r}: no such file"
    for name in (missing, "./none", "~/none/such"):
        assert "no such folder; expected a folder or a hub id" in refusal(from_dataset, name)
    (tmp_path / "x.jsonl").write_bytes(LINES)
    assert "is a file: give it as data.train_path" in refusal(from_dataset, tmp_path / "x.jsonl")


def test_a_file_without_line_ends_does_not_fill_the_memory(tmp_path, monkeypatch):
    """It is refused where the limit is passed; an array in one line is no such file."""
    monkeypatch.setattr(rows, "_LINE_BYTES", 100)
    rest = "{" * 200
    line = refusal(from_file, tmp_path / "x.jsonl", LINES + rest.encode())
    assert "x.jsonl line 3: longer than 0 MiB: expected one JSON object a line" in line
    assert len(from_file(tmp_path / "y.json", json.dumps(TWO * 20))) == 40


# ---- Parquet and datasets -----------------------------------------------------------------------


def test_parquet(tmp_path):
    """With characters in its name that stand for others in a pattern."""
    found = from_parquet(tmp_path / "train [1]*.parquet", [GSM8K] * 3, prompt_field="question")
    assert found == [Example(USER, GSM8K["answer"], {})] * 3
    (tmp_path / "x.parquet").write_bytes(b"hello")
    config = DataConfig(source="parquet", train_path=str(tmp_path / "x.parquet"))
    line = refusal(lambda: list(read(config)))
    assert line.startswith(f"data.train_path='{tmp_path / 'x.parquet'}': cannot be loaded: ")


def test_decimals_keep_all_their_digits(tmp_path):
    digits = "12345678901234567890123456789012345"
    table = pyarrow.table(
        {"prompt": ["a"], "answer": pyarrow.array([Decimal(digits)], pyarrow.decimal128(38, 0))}
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    config = DataConfig(source="parquet", train_path=str(tmp_path / "x.parquet"))
    assert [r.answer for r in read(config)] == [digits]


def test_images_stay_bytes_at_any_depth(tmp_path):
    """Decoded ones are other objects each time: equal rows would not be equal."""
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
        }
    )
    row = {"prompt": "a", "answer": "1", "images": [{"bytes": b"no image", "path": None}]}
    datasets.Dataset.from_list([row], features=features).save_to_disk(str(tmp_path / "d"))
    (example,) = from_dataset(tmp_path / "d")
    assert example.metadata == {"images": [{"bytes": b"no image", "path": None}]}


def test_labels_are_named_and_formats_are_left_aside(tmp_path):
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 0}]
    made = datasets.Dataset.from_list(rows, features=features)
    made.with_format("numpy").save_to_disk(str(tmp_path / "d"))
    assert [r.answer for r in from_dataset(tmp_path / "d")] == ["yes", "no"]


def test_a_parquet_file_without_rows_has_none(tmp_path):
    table = pyarrow.table({"prompt": pyarrow.array([], "string")})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    config = DataConfig(source="parquet", train_path=str(tmp_path / "x.parquet"))
    assert list(read(config)) == []


def test_dataset_folders(tmp_path):
    """What `save_to_disk` wrote, with splits and without, and a folder of files."""
    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"prompt": name, "answer": 1}]) for name in ("a", "b")}
    )
    both.save_to_disk(str(tmp_path / "both"))
    both["a"].save_to_disk(str(tmp_path / "one"))
    (tmp_path / "files").mkdir()
    for name in ("train", "test"):
        (tmp_path / "files" / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "answer": 1}}\n')

    def prompt(dataset: str, **options) -> str:
        (example,) = from_dataset(tmp_path / dataset, **options)
        return example.messages[0]["content"]

    assert prompt("both", train_split="b") == "b"
    assert prompt("one") == "a"
    assert prompt("files") == "train"
    assert prompt("files", eval_split="test", held_out=True) == "test"
    assert "'train': cannot be loaded: no such split; it has a, b" in refusal(prompt, "both")
    assert "one unnamed split" in refusal(prompt, "one", train_split="b")
    assert "Unknown split" in refusal(prompt, "files", train_split="dev")
    assert "'main' not found" in refusal(prompt, "files", dataset_config="main")


def test_a_column_of_texts_and_numbers_keeps_both(tmp_path):
    """`datasets` stores it as JSON: the answers are not to come with quotation marks."""
    (tmp_path / "d").mkdir()
    content = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "x"}]
    (tmp_path / "d" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    assert [r.answer for r in from_dataset(tmp_path / "d")] == ["1", "x"]


def test_unreachable_hub_is_one_line(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    line = refusal(from_dataset, "someone/something")
    assert line.startswith("data.dataset='someone/something' split 'train': cannot be loaded: ")
    assert "Couldn't reach" in line


# ---- fields -------------------------------------------------------------------------------------


def test_gsm8k_row(tmp_path):
    (example,) = from_file(
        tmp_path / "x", [GSM8K], prompt_field="question", answer_pattern="#### (.*)"
    )
    assert example == Example(USER, "1,072", {"answer": GSM8K["answer"]})


@pytest.mark.parametrize("form", [from_file, from_parquet])
def test_verl_row(tmp_path, form):
    (example,) = form(tmp_path / "x", [VERL], answer_field="reward_model.ground_truth")
    assert example == Example(USER, "72", {k: v for k, v in VERL.items() if k != "prompt"}, True)


@pytest.mark.parametrize("form", [from_file, from_parquet])
def test_trl_conversational_row(tmp_path, form):
    (example,) = form(tmp_path / "x", [TRL], answer_field="solution")
    assert example == Example(tuple(TRL["prompt"]), "72", {}, True)


def test_a_key_with_a_dot_wins_over_a_nested_one(tmp_path):
    row = {
        "q.text": "a",
        "q": {"text": "b", "x.y": "d"},
        "a": [{"n": 1}, {"n": 2}],
        "e.f": {"g": 5},
    }
    fields = {"q.text": "a", "q.x.y": "d"}
    for field, value in fields.items():
        for answer, number in (("a.1.n", "2"), ("e.f.g", "5")):
            (found,) = from_file(tmp_path / "x", [row], prompt_field=field, answer_field=answer)
            assert (found.messages[0]["content"], found.answer) == (value, number)


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (GSM8K, {}, "expected either prompt or messages, got keys ['answer', 'question']; name "),
        (
            GSM8K,
            {"prompt_field": "qestion"},
            "qestion is missing: data.prompt_field must be one of question, answer; did you mean "
            "question?",
        ),
        (
            VERL,
            {"answer_field": "reward_model.groundtruth"},
            "reward_model.groundtruth is missing: data.answer_field must be one of data_source, "
            "prompt, ability, reward_model, reward_model.style, reward_model.ground_truth, ",
        ),
        (VERL, {"answer_field": "reward_model"}, "reward_model={'style': 'rule', "),
        ({f"k{i}": i for i in range(30)} | {"prompt": "a"}, {}, "k18, k19 and 11 more"),
        (
            GSM8K,
            {"prompt_field": "question", "answer_pattern": "##### (.*)"},
            "answer='48/2 = <<48/2=24>>24 clips.\\n#### 1,072': data.answer_pattern="
            "'##### (.*)' finds nothing in it",
        ),
        ({"prompt": "a", "answer": "#### "}, {"answer_pattern": "#### (.*)"}, "finds nothing"),
        ({"prompt": "a", "answer": ["1"]}, {}, "answer=['1']: expected text or a finite number"),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]} | GSM8K, {}, "both text"),
        (
            {"prompt": [*TRL["prompt"], {"role": "assistant", "content": "72"}], "answer": "72"},
            {},
            "prompt: the last message's role is 'assistant': expected user",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, row, options, expected):
    line = refusal(from_file, tmp_path / "x.jsonl", [row], **options)
    assert line.startswith(f"{tmp_path / 'x.jsonl'} line 1: ") and expected in line


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("1e-05", "0.00001"),
        ("14.0", "14"),
        ("27", "27"),
        ("-0.0", "0"),
        ("0.1", "0.1"),
        ("1e22", "1" + "0" * 22),
        ("-2.50", "-2.5"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
    ],
)
def test_numbers_are_written_as_a_person_writes_them(tmp_path, number, text):
    """`1e-05` would be read as an expression, e minus 5."""
    (found,) = from_file(tmp_path / "x", f'{{"prompt": "a", "answer": {number}}}')
    assert found.answer == text


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("field", ["answer", "reward_model.ground_truth", "answers.1"])
def test_numbers_of_low_precision_have_their_own_digits(tmp_path, field, precision):
    """A float32 of 0.1 is 0.10000000149011612 in Python."""
    kind = {"float32": pyarrow.float32(), "float16": pyarrow.float16()}[precision]
    value = np.dtype(precision).type(0.1)
    columns = {
        "answer": pyarrow.array([value], kind),
        "reward_model": pyarrow.array(
            [{"ground_truth": value}], pyarrow.struct({"ground_truth": kind})
        ),
        "answers": pyarrow.array([[value, value]], pyarrow.list_(kind)),
    }
    table = pyarrow.table({"prompt": ["a"], **columns})
    pyarrow.parquet.write_table(table, tmp_path / "x")
    config = DataConfig(source="parquet", train_path=str(tmp_path / "x"), answer_field=field)
    assert [r.answer for r in read(config)] == ["0.1"]
    assert float(value) != 0.1


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["answer_pattern='#### (.*'"], "answer_pattern='#### (.*': not a regular expression"),
        (["answer_pattern='#### .*'"], "expected one group, the reference answer, got 0"),
        (["answer_pattern='(#+) (.*)'"], "expected one group, the reference answer, got 2"),
        (
            ["eval_split=test"],
            "data.eval_split='test': expected data.source huggingface, got jsonl",
        ),
        (
            ["dataset=chain_sum"],
            "dataset='chain_sum': expected data.source reasoning_gym or huggingface, got jsonl",
        ),
        (["params={a: 1}"], "data.params={'a': 1}: expected data.source reasoning_gym, got jsonl"),
        (["train_size=5"], "data.train_size=5: expected data.source reasoning_gym, got jsonl"),
        (["chat_template_args={tokenize: false}"], "chat_template_args.tokenize: papo sets it"),
        (["source=huggingface"], "data.dataset is missing: data.source=huggingface needs a folder"),
        (
            ["source=huggingface", "dataset=d"],
            "data.train_path='x': expected data.source jsonl or parquet, got huggingface",
        ),
    ],
)
def test_options_are_checked_before_anything_is_read(tmp_path, overrides, expected):
    (tmp_path / "run.yaml").write_text(MINIMAL)
    data = ["data={source: jsonl, train_path: x}", *(f"data.{o}" for o in overrides)]
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", data)
    assert expected in str(caught.value)


def test_every_config_on_the_page_about_data_is_valid():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    sections = [block["data"] for block in blocks]
    assert len(sections) > 5
    for section in sections:
        DataConfig(
            **({"source": "jsonl", "train_path": "x"} if "source" not in section else {}), **section
        )
