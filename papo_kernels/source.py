"""Where logits come from: a tensor that holds them, or hidden states and the model's head.

What is constant over a run, the head and the way of computing, is an object that is made once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_finite, check_positive, check_type, check_vocab_size

# What model configs call the number that logits are multiplied by (Cohere, Falcon-H1) or divided by
# (Granite).
_LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_LOGIT_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")


class Logits(NamedTuple):
    """Logits that are held, with what a model does to them before the softmax.

    A plain tensor stands for ``Logits(tensor)``.

    Attributes:
        values: ``[..., V]`` float16, bfloat16, float32, or float64 (reference and cpu backends).
            -inf masks a token: p = 0, gradient 0. Read without a copy where the leading dimensions
            flatten to one stride and the last has stride 1.
        softcap: u = softcap * tanh(z / softcap) / temperature; > 0, None for none.
        vocab_size: columns from there on are padding: never read, p = 0, gradient 0.
    """

    values: Tensor
    softcap: float | None = None
    vocab_size: int | None = None


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


class KeepSet(NamedTuple):
    """The ids that each token's sampling filter (top-k, top-p, min-p) kept, as compressed rows.

    Attributes:
        offsets: ``[N + 1]`` int64, nondecreasing, from 0 to nnz: token i kept
            ``ids[offsets[i] : offsets[i + 1]]``, in any order; N counts the tokens of `targets` in
            row-major order.
        ids: ``[nnz]`` int64 in [0, vocab_size), the sampled id of each token among its own.
    """

    offsets: Tensor
    ids: Tensor


@dataclass(frozen=True, eq=False)
class Head:
    """A language model's head: logits = logit_scale (hidden W^T + bias), capped by `softcap`.

    Make one for a run and call it with each batch's hidden states. It holds the parameters
    themselves, never a gathered copy: under DeepSpeed ZeRO-3 a call has to be inside a gather, or
    inside the forward pass of a module that the weight is registered with.

    Args:
        weight: ``[V, D]`` like the hidden states. Under ``torch.autocast`` both are cast as
            ``F.linear`` casts them. The gradient of one that does not require it costs nothing.
        bias: ``[V]`` like `weight`; -inf masks a token.
        lora: a low-rank addition to `weight`.
        softcap: u = softcap * tanh(z / softcap) / temperature; > 0, None for none.
        logit_scale: a factor on the logits before the soft cap (Cohere; Granite's divisor is its
            inverse); > 0, None for 1.
        vocab_size: rows of the whole head's weight from there on are padding: never read, p = 0,
            gradient 0.
        group: the ranks that the rows of the weight are spread over (Megatron's vocabulary
            parallelism), rank r's rows before those of rank r + 1. `weight`, `bias` and `lora.b`
            then hold this rank's rows, any number of them, 0 included; `lora.a` is whole. None: one
            rank holds them all; ``torch.distributed.group.WORLD`` is None until the group exists.
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
    group: torch.distributed.ProcessGroup | None = None
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
                check_positive(name, getattr(self, name), "None or a finite number > 0")
        check_vocab_size(self.vocab_size)
        if self.shards is not None and self.group is None:
            raise ValueError(
                "group: expected the process group that shards counts the rows of, got None"
            )

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers causal language model, with the soft cap and the scale that
        the model's config asks for.

        Raises:
            TypeError: `model` has no output embeddings, or they are more than a linear layer, as
                with an adapter: make ``Head(weight, lora=LoRA(...))`` from their parts.
        """
        projection = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(projection, torch.nn.Linear):
            raise TypeError(
                "model: expected a causal language model whose get_output_embeddings() is an "
                f"nn.Linear, got {type(model).__name__} with {type(projection).__name__}; make "
                "Head(weight, bias=..., lora=...) of its parts"
            )
        config = model.config.get_text_config()
        scale = math.prod(getattr(config, name, None) or 1.0 for name in _LOGIT_FACTORS)
        scale /= math.prod(getattr(config, name, None) or 1.0 for name in _LOGIT_DIVISORS)
        return cls(
            projection.weight,
            projection.bias,
            softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=None if scale == 1.0 else scale,
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


@dataclass(frozen=True)
class Compute:
    """How a call is computed. No option changes a result but by rounding.

    Args:
        backend: "reference", "cpu", "triton" or "cuda"; None: ``PAPO_BACKEND`` or else the fastest
            that serves the logits.
        chunk_bytes: the workspace of a head's logits; None: 256 MiB, or 1/32 of a GPU's memory
            where that is more.
        logits_dtype: of a head's logits; None: float32 (float64 for float64). For half-precision
            hidden states the other choice is their own dtype, which rounds every logit to 8
            (bfloat16) or 11 bits. It is faster on a CPU, where a product of half-precision numbers
            is half precision, and float32 logits take a float32 product.
        inplace: `policy_loss` overwrites the logits it is given with their gradient instead of
            allocating it. They must not be a leaf or a view, and belong to this loss alone: another
            use in a loss, or a second backward, raises. No effect under no_grad, nor under
            torch.compile, which places its buffers itself.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of its range.
    """

    backend: str | None = None
    chunk_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    inplace: bool = False

    def __post_init__(self) -> None:
        size = self.chunk_bytes
        if size is None:
            return
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"chunk_bytes: expected an int or None, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"chunk_bytes: expected at least 1, got {size}")
