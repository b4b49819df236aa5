"""Tiny random models of many families: each restricts attention, or mixes tokens, in its own way.

Windows and chunks are 8 tokens wide, so that sequences of tens of tokens are longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from papo.model.attention import shared_prompts
from papo.policy.batch import MicroBatch, TrainingSequence, collate
from papo.policy.module import Policy
from papo.policy.passes import stats_of
from papo_kernels import Compute, TokenStats

V = 64
WINDOW = 8
_SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_WINDOW_AND_FULL = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_WINDOW_AND_FULL, "query_pre_attn_scalar": 8},
    "gpt_oss": {**_WINDOW_AND_FULL, **_EXPERTS},
    "cohere2": {**_WINDOW_AND_FULL, "logit_scale": 1.0},
    "llama4_text": {
        **_EXPERTS,
        "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "attn_temperature_tuning": False,
        "intermediate_size_mlp": 48,
        "moe_layers": [1],
    },
    "gpt2": {**_GPT, "n_positions": 256},
    "gpt_neox": {},
    "bloom": _GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {
        **_LINEAR,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "mamba": {"state_size": 4},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": WINDOW,
    },
    "minimax": {**_EXPERTS, "layer_types": _LINEAR["layer_types"], "block_size": WINDOW},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": WINDOW},
}


def build(family: str, attention: str = "eager", **options: Any) -> Any:
    """A model in float32 and evaluation mode whose logits are far from uniform."""
    config = AutoConfig.for_model(family, **{**_SIZES, **_OPTIONS.get(family, {}), **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.25)
    model.generation_config = GenerationConfig()
    return model.float().eval()


class PlainEngine:
    """What the stages ask of an engine, without DeepSpeed."""

    device = torch.device("cpu")

    def __init__(self, causal_lm: Any, **options: Any) -> None:
        self.policy = Policy(
            causal_lm, **{"temperature": 1.0, "compute": Compute("reference"), **options}
        )
        self.policy.eval()

    def forward(self, *args: Any) -> Any:
        return self.policy(*args)

    def train(self, mode: bool) -> None:
        self.policy.train(mode)

    def inference_model(self) -> Any:
        import contextlib

        return contextlib.nullcontext(self.policy.causal_lm.eval())


def sequences() -> list[TrainingSequence]:
    """Three completions of a long prompt and three of a short one, of other lengths each."""
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, V, (n,), generator=generator).tolist())

    prompts = [ids(11), ids(5)]
    return [
        TrainingSequence(prompts[i // 3], ids(n), (0.0,) * n, 1.0, 1.0, i // 3)
        for i, n in enumerate((7, 10, 13, 16, 19, 22))
    ]


def trained(engine: PlainEngine, parts: Sequence[TrainingSequence], row_tokens: int) -> TokenStats:
    """Statistics on the way that training takes, with rows padded on the right."""
    batch = collate(parts, pad_id=0, max_row_tokens=row_tokens, width_multiple=32)
    return stats_of(engine, batch)


def token_logits(model: Any, batch: MicroBatch) -> torch.Tensor:
    """[N, V] of the model itself on a micro-batch's rows."""
    with shared_prompts(batch.segment_ids, batch.position_ids):
        hidden = model.get_decoder()(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch.logit_index])


def alone(model: Any, parts: Sequence[TrainingSequence]) -> torch.Tensor:
    """Log-probs from the model's own logits, a pass without padding for each sequence."""
    found = []
    for part in parts:
        ids, n = torch.tensor([part.prompt_ids + part.response_ids]), len(part.prompt_ids)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, n - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, ids[0, n:, None]).squeeze(1))
    return torch.cat(found)
