"""A language model's head, made once for a run, and the logits that calling it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from papo_kernels.checks import check_factor, check_finite, check_type, check_vocab_size

from .keep import KeepSet
from .projection import check_hooks, is_linear, unwrapped
from .split import check_group

# What model configs call the number that logits are multiplied by (Cohere, Falcon-H1), the one they
# are divided by (Granite), and the soft cap (Gemma, RecurrentGemma, xLSTM).
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Model types whose logits do not have what their config names, and those with a text config of
# their own whose logits have what that names (transformers 5.23).
_WITHOUT = {"mpt": "logit_scale", "gemma3": "final_logit_softcapping"}
_OF_TEXT = ("gemma3n", "gemma4", "paligemma", "granite4_vision", "granite_docling", "hyperclovax")


def _options_of(config: Any) -> tuple[float | None, float | None, int | None]:
    """Soft cap, scale and number of the logits that a transformers model with this config gives.

    Raises:
        TypeError: that cannot be told from the config.
    """
    kind, text = str(config.model_type), config.get_text_config()

    def numbers(names: Sequence[str]) -> list[float]:
        named = (getattr(text, name, None) for name in names if name != _WITHOUT.get(kind))
        return [float(number) for number in named if number]

    factors, divisors = numbers(_FACTORS), numbers(_DIVISORS)
    if kind.startswith("hyperclovax"):  # what Granite divides by it multiplies by
        factors, divisors = factors + divisors, []
    scale = math.prod(factors) / math.prod(divisors)
    softcap = next(iter(numbers(_SOFTCAPS)), None)
    changed = scale != 1.0 or softcap is not None
    if changed and text is not config and not kind.startswith(_OF_TEXT):
        raise TypeError(
            f"model: expected one that is known to apply its text config's soft cap {softcap} and "
            f"logit scale {scale:g}, got model type {kind!r}; make Head(weight, softcap=..., "
            "logit_scale=...) as its forward has them"
        )
    return softcap, None if scale == 1.0 else scale, getattr(text, "unpadded_vocab_size", None)


class LoRA(NamedTuple):
    """A low-rank addition to a head: logits += scaling (h A^T) B^T. B A is never formed.

    Attributes:
        a: ``[r, D]``, of the weight's dtype.
        b: ``[V, r]``, of the weight's dtype.
        scaling: alpha / r.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0


@dataclass(frozen=True, eq=False)
class Head:
    """A language model's head: logits = logit_scale (hidden W^T + bias), capped by `softcap`.

    Make one for a run and call it with each batch's hidden states. It holds the parameters
    themselves, never a gathered copy: under DeepSpeed ZeRO-3 a call has to be inside a gather, or
    inside the forward pass of a module that the weight is registered with. Make it after whatever
    puts other parameters in their place, such as ``resize_token_embeddings``, FSDP's
    ``fully_shard`` and ``load_state_dict(assign=True)``.

    Args:
        weight: ``[V, D]`` like the hidden states. Under ``torch.autocast`` both are cast as
            ``F.linear`` casts them. The gradient of one that does not require it costs nothing.
        bias: ``[V]`` like `weight`; -inf masks a token.
        lora: a low-rank addition to `weight`.
        softcap: u = softcap * tanh(z / softcap) / temperature; in [1e-18, 1e18], None for none.
        logit_scale: a factor on the logits before the soft cap (Cohere; Granite's divisor is its
            inverse); in [1e-18, 1e18], None for 1.
        vocab_size: rows of the whole head's weight from there on are padding: never read, p = 0,
            gradient 0.
        group: the ranks that the rows of the weight are spread over (Megatron's vocabulary
            parallelism), rank r's rows before those of rank r + 1. `weight`, `bias` and `lora.b`
            then hold this rank's rows, any number of them, 0 included; `lora.a` is whole. "world"
            is the default group, looked up in each call. None: one rank holds them all; so
            ``torch.distributed.group.WORLD``, which is None until the group exists, is not split.
        shards: with `group`: how many rows each rank has, where that is known. Without it every
            call exchanges integers, for which it waits for the GPU. With it each rank checks its
            arguments alone, and ``Compute.chunk_bytes`` is needed where the ranks' GPUs differ in
            memory.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of its range.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora: LoRA | None = None
    softcap: float | None = None
    logit_scale: float | None = None
    vocab_size: int | None = None
    group: torch.distributed.ProcessGroup | str | None = None
    shards: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_type("weight", self.weight, Tensor)
        if self.bias is not None:
            check_type("bias", self.bias, Tensor)
        if self.lora is not None:
            check_type("lora", self.lora, LoRA)
            check_type("lora.a", self.lora.a, Tensor)
            check_type("lora.b", self.lora.b, Tensor)
            check_finite("lora.scaling", self.lora.scaling)
        for name in ("softcap", "logit_scale"):
            if getattr(self, name) is not None:
                check_factor(name, getattr(self, name), "None or ")
        check_vocab_size(self.vocab_size)
        if self.group is not None:
            check_group(self.group)
        elif self.shards is not None:
            raise ValueError(
                "group: expected the process group that shards counts the rows of, got None"
            )
        if self.shards is not None:
            check_type("shards", self.shards, Sequence)
            if not all(isinstance(rows, int) and rows >= 0 for rows in self.shards):
                raise ValueError(f"shards: expected numbers of rows >= 0, got {self.shards!r}")

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers causal language model, with the soft cap and the scale that
        the model's config asks for, and PEFT's active LoRA adapter of its projection.

        Raises:
            TypeError: `model` has no output embeddings, or they are more than a linear layer or
                PEFT's LoRA of one: DoRA, a bias or dropout of LoRA, merged or several active
                adapters, a hook.
        """
        given: Any = getattr(model, "get_output_embeddings", lambda: None)()
        projection, adapter = unwrapped(given)
        if not is_linear(projection):
            raise TypeError(
                "model: expected a causal language model whose get_output_embeddings() is an "
                f"nn.Linear, got {type(model).__name__} with {type(projection).__name__}; make "
                "Head(weight, bias=..., lora=...) of its parts"
            )
        check_hooks(projection)
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "get_text_config") or config.is_encoder_decoder:
            raise TypeError(
                "model: expected a causal language model with a transformers config, got "
                f"{type(model).__name__} with {type(config).__name__}"
            )
        softcap, scale, size = _options_of(config)
        return cls(
            projection.weight,
            projection.bias,
            None if adapter is None else LoRA(*adapter),
            softcap=softcap,
            logit_scale=scale,
            vocab_size=size,
        )

    def __call__(self, hidden: Tensor, *, keep: KeepSet | None = None) -> LazyLogits:
        """The logits of `hidden`, which `token_stats` and `policy_loss` compute a chunk at a time.

        Args:
            hidden: ``[..., D]`` float16, bfloat16, float32, or float64 (reference and cpu
                backends).
            keep: what each token's sampling filter kept; p is renormalized over that.
        """
        return LazyLogits(hidden, self, keep)


class LazyLogits(NamedTuple):
    """What calling a `Head` gives: logits that are never held whole."""

    hidden: Tensor
    head: Head
    keep: KeepSet | None = None
