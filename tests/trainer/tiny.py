"""A random two-layer Llama with a character tokenizer, written as a Hugging Face folder.

`python -m tests.trainer.tiny FOLDER [--untied]` for tests that run the trainer as a process.
"""

from __future__ import annotations

import string
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The least that a config holds.
MINIMAL = """
name: test
steps: 3
model: {path: somewhere}
data: {source: reasoning_gym, dataset: chain_sum}
rollout: {prompts_per_step: 4, completions_per_prompt: 8, max_new_tokens: 24}
"""


def small_llama(seed: int, **options: Any) -> LlamaForCausalLM:
    """Random weights that `seed` determines, two layers of 32 where `options` say nothing else."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A token per printable character; padding is the end-of-sequence token, as in SmolLM2."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *string.printable))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def build_model(folder: str | Path, *, tied: bool = True, seed: int = 0) -> Path:
    """Write model and tokenizer into `folder`; the same `seed` gives the same weights."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        model = small_llama(
            seed,
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            attention_dropout=0.1,  # acts with model.dropout alone
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    build_model(sys.argv[1], tied="--untied" not in sys.argv)
