"""`Head.of`: tiny models of transformers, whose own logits the head's are held against."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from papo_kernels import Head, token_stats

V, D = 50, 16
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# family: its options, and the soft cap and scale of its head.
FAMILIES = {
    "llama": ({}, None, None),
    "gemma2": ({"final_logit_softcapping": 0.8, "query_pre_attn_scalar": 8}, 0.8, None),
    "granite": ({"logits_scaling": 4.0}, None, 0.25),
    "cohere": ({"logit_scale": 0.25}, None, 0.25),
    "phi": ({}, None, None),  # with a bias
    "hyperclovax": ({"logits_scaling": 4.0}, None, 4.0),  # the other way round than Granite
    "recurrent_gemma": ({"logits_soft_cap": 2.0, "num_hidden_layers": 3}, 2.0, None),
    "mpt": ({"logit_scale": 0.5, "d_model": D, "n_heads": 2, "n_layers": 1}, None, None),
}


def tiny(family, **options):
    """A causal language model in evaluation mode, its head far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.get_output_embeddings().parameters():
                parameter.normal_()
    return model.float().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_head_gives_the_models_logits(family):
    """Parameters, soft cap and scale are those of the model, and so are the statistics."""
    options, softcap, scale = FAMILIES[family]
    model = tiny(family, **options)
    head = Head.of(model)
    projection = model.get_output_embeddings()
    assert head.weight is projection.weight and head.bias is projection.bias
    assert (head.bias is not None) == (family == "phi")
    assert (head.softcap, head.logit_scale) == (softcap, scale)
    tokens = torch.arange(12).view(2, 6) * 4
    with torch.no_grad():
        hidden = model.base_model(tokens).last_hidden_state
        expected = token_stats(model(tokens).logits, tokens + 1)
        actual = token_stats(head(hidden), tokens + 1)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


class Scaled(nn.Linear):
    """Does more to the hidden states than multiply them."""

    def forward(self, hidden):
        return super().forward(2.0 * hidden)


def test_a_head_that_is_no_linear_layer_is_refused():
    """Naming what was found instead: no model at all, a body without a head, an adapter's layer."""
    message = r"model: expected a causal language model .* nn\.Linear, got {} with {}; make Head\("
    model = tiny("llama")
    for other, names in (
        (nn.Linear(D, V), ("Linear", "NoneType")),
        (model.base_model, ("LlamaModel", "NoneType")),
    ):
        with pytest.raises(TypeError, match=message.format(*names)):
            Head.of(other)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(D, V))
    for layer in (nn.Sequential(nn.Linear(D, V)), Scaled(D, V), parametrized):
        model.set_output_embeddings(layer)
        name = type(layer).__name__
        with pytest.raises(TypeError, match=message.format("LlamaForCausalLM", name)):
            Head.of(model)


def test_a_head_whose_options_the_config_does_not_tell_is_refused():
    """A model around a text model may leave out what the text model does to its logits."""
    from transformers import AutoConfig

    model = tiny("llama")
    text = AutoConfig.for_model("gemma2", **SIZES, final_logit_softcapping=0.8)
    model.config = AutoConfig.for_model("llava", text_config=text)
    with pytest.raises(
        TypeError, match=r"model: .* soft cap 0\.8 and logit scale 1, got .*'llava'"
    ):
        Head.of(model)
    model.config = AutoConfig.for_model("t5")
    with pytest.raises(TypeError, match=r"model: .*transformers config, got Llama.* with T5Config"):
        Head.of(model)
    model.config = {}
    with pytest.raises(TypeError, match=r"model: .*transformers config, got Llama.* with dict"):
        Head.of(model)


class Adapted(nn.Module):
    """What Head.of reads of PEFT's layer (peft 0.21), which is known by its class."""

    def __init__(self, base, names=("default",)):
        super().__init__()
        self.base_layer, self.active_adapters = base, list(names)
        self.merged_adapters, self.disable_adapters = [], False
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_dropout, self.lora_magnitude_vector = nn.ModuleDict(), nn.ModuleDict()
        self.use_dora, self.lora_bias, self.lora_variant, self.scaling = {}, {}, {}, {}
        for name in names:
            self.lora_A[name] = nn.Linear(D, 3, bias=False)
            self.lora_B[name] = nn.Linear(3, V, bias=False)
            self.lora_dropout[name] = nn.Identity()
            self.scaling[name] = 0.5

    def forward(self, hidden):
        logits = self.base_layer(hidden)
        for name in () if self.disable_adapters else self.active_adapters:
            low = self.lora_A[name](self.lora_dropout[name](hidden))
            logits = logits + self.lora_B[name](low) * self.scaling[name]
        return logits


Adapted.__module__, Adapted.__qualname__ = "peft.tuners.lora.layer", "Linear"


def adapted(names=("default",)):
    model = tiny("llama")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.set_output_embeddings(Adapted(model.get_output_embeddings(), names))
    return model, model.get_output_embeddings()


@pytest.mark.parametrize("disabled", [False, True])
def test_a_lora_adapter_gives_the_models_logits(disabled):
    model, layer = adapted()
    layer.disable_adapters = disabled
    head = Head.of(model)
    assert (head.lora is None) == disabled
    tokens = torch.arange(12).view(2, 6) * 4
    with torch.no_grad():
        hidden = model.base_model(tokens).last_hidden_state
        expected = token_stats(model(tokens).logits, tokens + 1)
        for a, b in zip(token_stats(head(hidden), tokens + 1), expected, strict=True):
            torch.testing.assert_close(a, b)


# kind: how the layer gets it.
MORE_THAN_LORA = {
    "DoRA": lambda layer: layer.use_dora.update(default=True),
    "a LoRA bias": lambda layer: layer.lora_bias.update(default=True),
    "LoRA dropout": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.1)}),
    "a variant of LoRA": lambda layer: layer.lora_variant.update(default=object()),
    "merged adapters": lambda layer: layer.merged_adapters.append("default"),
}


@pytest.mark.parametrize("kind", MORE_THAN_LORA)
def test_what_is_more_than_lora_is_refused(kind):
    model, layer = adapted()
    MORE_THAN_LORA[kind](layer)
    with pytest.raises(TypeError, match=rf"model: .* or none, not {kind}, got .*default"):
        Head.of(model)


def test_several_active_adapters_are_refused():
    model, layer = adapted(("one", "other"))
    with pytest.raises(TypeError, match=r"not several active adapters, got \['one', 'other'\]"):
        Head.of(model)
    layer.active_adapters = ["other"]
    assert Head.of(model).lora.a is layer.lora_A["other"].weight


def doubles(layer, *arguments):
    return 2.0 * arguments[-1]


def test_hooks_that_a_head_would_leave_out_are_refused():
    """But for those of what shards a model's parameters."""
    message = r"without hooks, .* got .*test_head_of_model\.doubles"
    for layer_of in (lambda layer: layer.base_layer, lambda layer: layer):
        model, layer = adapted()
        layer_of(layer).register_forward_hook(doubles)
        with pytest.raises(TypeError, match=message):
            Head.of(model)
    model = tiny("llama")
    projection = model.get_output_embeddings()
    projection.forward = lambda hidden: 2.0 * nn.functional.linear(hidden, projection.weight)
    with pytest.raises(TypeError, match=r"without hooks, .*<lambda>"):
        Head.of(model)
    del projection.forward

    def gather(layer, *arguments): ...

    gather.__module__ = "deepspeed.runtime.zero.parameter_offload"
    projection.register_forward_pre_hook(gather)
    assert Head.of(model).weight is projection.weight
