"""What is refused before torch is imported, and what a hub without an answer costs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from papo import hub, preflight
from papo.config import DataConfig, TrainConfig
from papo.data.examples import first
from papo.errors import PapoError
from papo.model.files import check_folder

ROOT = Path(__file__).parents[2]


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "name": "test",
            "steps": 1,
            "model": {"path": "smollm2-135m"},
            "data": {"source": "reasoning_gym", "dataset": "chain_sum"},
            "rollout": {"prompts_per_step": 4, "completions_per_prompt": 2, "max_new_tokens": 8},
            **changes,
        }
    )


def refusal(**changes: Any) -> str:
    with pytest.raises(PapoError) as caught:
        preflight.check(config(**changes))
    return str(caught.value)


def file(path: Path, source: str = "jsonl") -> dict[str, Any]:
    return {"source": source, "train_path": str(path)}


# ---- files and names ----------------------------------------------------------------------------


def test_problems_are_looked_for_and_the_first_is_made(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"prompt": "a", "answer": 1}\n')
    bad.write_text('{"prompt": "a", "answr": 1}\n')
    preflight.check(config(data=file(good)))
    assert "bad.jsonl line 1: answer is missing" in refusal(data=file(bad))
    assert "line 1: answer is missing" in refusal(data={**file(good), "eval_path": str(bad)})
    assert refusal(data=file(tmp_path / "x")).endswith("x': no such file")
    bad.write_text("")
    assert refusal(data=file(bad)).endswith("bad.jsonl': has no rows")
    assert "did you mean chain_sum" in refusal(
        data={"source": "reasoning_gym", "dataset": "chainsum"}
    )


def test_of_an_array_no_more_than_the_first_row_is_read(tmp_path: Path) -> None:
    """The run reads it as a whole and refuses what follows."""
    bad = tmp_path / "bad.jsonl"
    data = {"source": "jsonl", "train_path": str(bad)}
    bad.write_text('\n[\n {"prompt": "p", "answer": "1"}, no JSON')
    assert first(DataConfig(**data)).answer == "1"
    for text, told in (
        ("[ ]", "has no rows"),
        ('[{"prompt": ', "item 1: not JSON that can be read"),
    ):
        bad.write_text(text)
        with pytest.raises(PapoError, match=told):
            first(DataConfig(**data))


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"prompt": ["a"], "answer": ["1"]})
    pyarrow.parquet.write_table(table, path)
    preflight.check(config(data=file(path, "parquet")))
    assert "is missing: data.prompt_field" in refusal(
        data={**file(path, "parquet"), "prompt_field": "question"}
    )
    whole = path.read_bytes()
    for content in (b"", whole[:-9], whole[: len(whole) // 2], b"\0" * 500):
        path.write_bytes(content)
        assert "x.parquet': cannot be loaded: " in refusal(data=file(path, "parquet"))


def test_a_verifier_of_no_package_is_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text("raise RuntimeError('imported')\n")
    preflight.check(config(reward={"verifier": "my_reward:score"}))
    line = refusal(reward={"verifier": ["exact", "my_rewards.maths:score"]})
    assert line.startswith("reward.verifier='my_rewards.maths:score': no module my_rewards on the")


@pytest.mark.parametrize("resume", ["runs/none", "x" * 5000, "\udc80", "a\0b"])
def test_a_checkpoint_that_is_not_there_is_one_line(resume: str) -> None:
    """Also where the command line gave it, whose text the config does not check."""
    with pytest.raises(PapoError, match=r"^resume=.*: no checkpoint there; expected never, auto"):
        preflight.check(config().model_copy(update={"resume": resume}))


def test_a_runs_folder_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    line = refusal(output_dir=str(tmp_path / "file" / "run"))
    assert "file' is a file: expected a folder; choose another output_dir" in line
    preflight.check(config(output_dir=str(tmp_path / "a" / "b")))
    assert not (tmp_path / "a").exists()
    assert refusal(output_dir="/proc/run").endswith(
        "'/proc' cannot be written to (No such file or directory); choose another output_dir"
    )

    def full(**options: Any) -> Any:  # root may write anywhere
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preflight.tempfile, "TemporaryDirectory", full)
    assert f"'{tmp_path}' cannot be written to (No space left on device)" in refusal(
        output_dir=str(tmp_path / "a" / "b")
    )


def test_torch_is_not_imported_by_what_is_refused(tmp_path: Path, tiny_model_path: Path) -> None:
    """In a process of its own, after every kind of check."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_path, folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    rows = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), rows)
    good = {"model": {"path": str(tiny_model_path)}}
    cases = [
        {"model": {"path": str(folder)}},
        {**good, "data": file(tmp_path / "none")},
        {**good, "data": file(rows, "parquet")},
        {**good, "data": {"source": "reasoning_gym", "dataset": "chainsum"}},
        {**good, "reward": {"verifier": "nowhere:f"}},
        {"model": {"path": "nobody/nothing"}},
    ]
    code = """
import json, sys
from papo import preflight
from papo.config import TrainConfig
from papo.errors import PapoError
for case in json.load(sys.stdin):
    try:
        preflight.check(TrainConfig(**case))
    except PapoError as error:
        print(error)
assert not {"torch", "transformers", "deepspeed"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([config(**case).model_dump() for case in cases]),
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(cases), done.stdout


# ---- a model's folder ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", "{", "config.json: not JSON that can be read"),
        ("config.json", "[" * 10**5, "config.json: not JSON that can be read"),
        ("config.json", "[]", "config.json: expected a JSON object, got list"),
        ("config.json", "\0" * 100, "config.json: not JSON that can be read"),
        ("config.json", b"\xff\xfe{}", "config.json: byte 0xff at 0 is not UTF-8"),
        ("tokenizer_config.json", "null", "tokenizer_config.json: expected a JSON object"),
        ("generation_config.json", "", "generation_config.json: not JSON that can be read"),
        ("model.safetensors", "", "model.safetensors is cut off or no safetensors file"),
        ("model.safetensors", "x" * 1000, "model.safetensors is cut off or no safetensors file"),
        ("model.safetensors.index.json", "{}", "expected weight_map, from tensors to files"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "b.safetensors"}}',
            "lacks b.safetensors, which",
        ),
    ],
)
def test_damaged_files_of_a_model_are_named(
    tiny_model_path: Path, tmp_path: Path, name: str, content: Any, expected: str
) -> None:
    shutil.copytree(tiny_model_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PapoError) as caught:
        check_folder(tmp_path, str(tmp_path), 8)
    line = str(caught.value)
    assert line.startswith("model.path=") and expected in line and "\n" not in line


def test_weights_that_were_cut_off_or_are_missing(tiny_model_path: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_path, tmp_path, dirs_exist_ok=True)
    check_folder(tmp_path, "x", 10**6)  # rotary positions have no end
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(PapoError, match=r"model\.safetensors is cut off"):
        check_folder(tmp_path, "x", 8)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(PapoError, match="has no safetensors file"):
        check_folder(tmp_path, "x", 8)


def test_completions_longer_than_the_table_of_positions(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_positions": 64}')
    check_folder(tmp_path, "x", 63)
    with pytest.raises(PapoError, match=r"rollout\.max_new_tokens=64: expected less than 64"):
        check_folder(tmp_path, "x", 64)


# ---- the hub ------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub that refuses connections, and empty caches; the cache of the hub."""
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(tmp_path / "hub"))):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub.hub_fault.cache_clear()
    yield tmp_path / "hub"
    hub.hub_fault.cache_clear()


def test_a_hub_that_is_not_there_is_asked_once_for_each(offline: Path, monkeypatch) -> None:
    asked = []
    session = huggingface_hub.get_session()
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: asked.append(1) or session)
    line = refusal(model={"path": "someone/something"})
    assert line.startswith("model.path='someone/something': no such folder, not in the hub's cache")
    assert "http://127.0.0.1:9 cannot be reached: " in line
    line = refusal(data={"source": "huggingface", "dataset": "someone/something"})
    assert line.startswith("data.dataset='someone/something': no such folder, not in the hub's")
    assert len(asked) == 2 and os.environ["HF_HUB_OFFLINE"] == ""


def test_a_hub_that_never_answers_is_given_up(offline: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub, "_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert str(hub.hub_fault()).startswith(f"{endpoint} cannot be reached: ")


def test_what_is_in_the_cache_is_used_without_the_hub(
    offline: Path, tiny_model_path: Path, monkeypatch
) -> None:
    model = offline / "models--someone--something"
    shutil.copytree(tiny_model_path, model / "snapshots" / "0123")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123")
    (offline / "datasets--someone--something").mkdir()
    data = {"source": "huggingface", "dataset": "someone/something"}
    preflight.check(config(model={"path": "someone/something"}, data=data))
    assert os.environ["HF_HUB_OFFLINE"] == "1" and constants.HF_HUB_OFFLINE
    (model / "snapshots" / "0123" / "tokenizer.json").unlink()
    assert "the folder has no tokenizer" in refusal(model={"path": "someone/something"})


@pytest.mark.parametrize("name", ["a b", "--x", "x" * 200, "x..y"])
def test_what_is_no_hub_id_is_one_line(offline: Path, name: str) -> None:
    assert "neither a folder nor a hub id" in refusal(model={"path": name})
