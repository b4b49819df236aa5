"""A training job of a model of a size that users train, with random weights: it is as fast as any
such model, and made where it runs.

Imports no torch: reward workers import the file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

# What `profiled.py` traces, and where to.
STEP, TRACE = "PAPO_PROFILED_STEP", "PAPO_PROFILE"
PROMPTS, COMPLETIONS, NEW_TOKENS = 8, 8, 128
# Qwen2.5-1.5B's shape.
QWEN2 = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*")


def reward(text: str, answer: str, metadata: dict[str, Any]) -> float:
    """A verifier under which every group has right and wrong completions, whatever is sampled."""
    return float(sum(map(ord, text)) % 2)


def write_job(folder: Path) -> Path:
    """The throughput job's problems and config, and the config's path."""
    problems = [{"prompt": f"How much is {i} + {i}?", "answer": str(2 * i)} for i in range(64)]
    text = "".join(json.dumps(problem) + "\n" for problem in problems)
    (folder / "problems.jsonl").write_text(text)
    config = {
        "name": "throughput",
        "method": "papo",
        "model": {"path": str(folder / "model")},
        "data": {
            "source": "jsonl",
            "train_path": str(folder / "problems.jsonl"),
            "held_out_size": 8,
        },
        "reward": {"verifier": "benchmarks.gpu_check.training_job:reward"},
        "rollout": {
            "prompts_per_step": PROMPTS,
            "completions_per_prompt": COMPLETIONS,
            "max_new_tokens": NEW_TOKENS,
        },
        "optim": {"micro_batch_size": 16},
        "checkpoint": {"every": 0},
        "evaluation": {"before": False, "after": False},
        "metrics": {"measure_entropy_every": 0, "tensorboard": False},
    }
    (folder / "job.yaml").write_text(json.dumps(config, indent=2))  # JSON is YAML
    return folder / "job.yaml"


def write_model(folder: Path, shape: dict[str, Any], tokenizer: Path) -> None:
    """A model of random weights with the tokenizer of another model's folder."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    ends = AutoTokenizer.from_pretrained(tokenizer).eos_token_id
    config = Qwen2Config(**shape, eos_token_id=ends, bos_token_id=None, dtype=torch.bfloat16)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(where):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for pattern in TOKENIZER_FILES:
        for path in tokenizer.glob(pattern):
            shutil.copy(path, folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
