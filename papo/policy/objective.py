"""The policy as one module, so that one engine call is one pass: backbone, fused head and loss.

The backbone gives hidden states; only the positions that predict a response token reach the head,
whose logits exist a chunk of tokens at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from papo.model.attention import shared_prompts
from papo.model.load import decoder_of, recomputed_layers
from papo_kernels import (
    KeepSet,
    PolarityWeighting,
    PolicyLossOutput,
    PolicyLossParams,
    TokenStats,
    linear_policy_loss,
    linear_token_stats,
)

# What configs call the number that logits are multiplied with (Cohere, Falcon-H1) or divided by
# (Granite).
_LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_LOGIT_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")


class HeadOptions(NamedTuple):
    """What lies between hidden states and statistics: u = softcap(logit_scale z) / temperature.

    Attributes:
        temperature: of sampling; logp, entropy and polarity are all at this temperature.
        softcap, logit_scale: the model's own, see `of`; None where it has none.
        backend: papo_kernels backend, None chooses.
        full_logits: logits in float32. None: where the device multiplies half-precision numbers
            into float32 (CUDA); a CPU would have to widen them first, at several times the cost.
        chunk_bytes: workspace of the head, None for its default.
    """

    temperature: float
    softcap: float | None = None
    logit_scale: float | None = None
    backend: str | None = None
    full_logits: bool | None = None
    chunk_bytes: int | None = None

    @classmethod
    def of(cls, config: Any, temperature: float, **more: Any) -> HeadOptions:
        """With the soft cap (Gemma) and logit scale of a model config."""
        text = config.get_text_config()
        scale = math.prod(getattr(text, name, None) or 1.0 for name in _LOGIT_FACTORS)
        scale /= math.prod(getattr(text, name, None) or 1.0 for name in _LOGIT_DIVISORS)
        softcap = getattr(text, "final_logit_softcapping", None)
        return cls(temperature, softcap, None if scale == 1.0 else scale, **more)

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """As papo_kernels takes them."""
        full = hidden.is_cuda if self.full_logits is None else self.full_logits
        named = self._asdict()
        del named["full_logits"]
        return {**named, "logits_dtype": None if full else hidden.dtype}


class Head(nn.Module):
    """The LM head and what is computed from its logits, which are never whole.

    Reads the projection's weight and bias itself instead of calling it; the engine registers them
    with this module, so that ZeRO-3's hooks gather them around it.
    """

    def __init__(self, projection: nn.Module, options: HeadOptions) -> None:
        super().__init__()
        # A list keeps the projection out of this module's children: it belongs to the model.
        self._projection = [projection]
        self._options = options

    @property
    def parameters_read(self) -> list[nn.Parameter]:
        """The head's weight and, where there is one, its bias."""
        return list(self._projection[0].parameters())

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        tokens: Mapping[str, Any] | None,
        params: PolicyLossParams | None,
        weighting: PolarityWeighting | None,
        keep: tuple[Tensor, Tensor] | None = None,
    ) -> TokenStats | PolicyLossOutput:
        """The statistics, or with `tokens` (the loss's per-token inputs by name) the loss.

        `keep`: offsets and ids of the `KeepSet` that the sampler drew from, None for all ids.
        """
        projection: Any = self._projection[0]
        # Some backbones leave their residual in float32 (Mamba).
        hidden = hidden.to(projection.weight.dtype)
        options = {
            "bias": getattr(projection, "bias", None),
            "keep": None if keep is None else KeepSet(*keep),
            **self._options.arguments(hidden),
        }
        if tokens is None:
            return linear_token_stats(hidden, projection.weight, targets, **options)
        return linear_policy_loss(
            hidden,
            projection.weight,
            targets,
            **tokens,
            params=params,
            weighting=weighting,
            **options,
        )


class Policy(nn.Module):
    """A causal LM whose forward pass gives token statistics or the policy loss of a micro-batch.

    Args:
        causal_lm: a transformers causal LM.
        temperature: sampling temperature; logp, entropy and polarity are all at this temperature.
        dropout: keep the model's dropout, and whatever else it does in training alone, in passes
            with gradient.
        more: the rest of `HeadOptions`.
    """

    causal_lm: Any
    head: Head

    def __init__(
        self, causal_lm: Any, *, temperature: float, dropout: bool = False, **more: Any
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.dropout = dropout
        options = HeadOptions.of(causal_lm.config, temperature, **more)
        self.head = Head(causal_lm.get_output_embeddings(), options)

    def train(self, mode: bool = True) -> Policy:
        """Switch between passes with gradient and without; dropout only where it is kept."""
        super().train(mode and self.dropout)
        self.training = mode
        for layer in recomputed_layers(self.causal_lm):
            layer.training = mode
        return self

    def forward(
        self,
        batch: dict[str, Any],
        tokens: Mapping[str, Any] | None = None,
        params: PolicyLossParams | None = None,
        weighting: PolarityWeighting | None = None,
    ) -> tuple[Tensor, ...]:
        """Fields of `TokenStats` (no `tokens`) or of `PolicyLossOutput`, per token `[N]`."""
        with shared_prompts(batch["segment_ids"], batch["position_ids"]):
            hidden = decoder_of(self.causal_lm)(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                position_ids=batch["position_ids"],
                use_cache=False,
            ).last_hidden_state
        selected = hidden.flatten(0, 1).index_select(0, batch["logit_index"])
        cut = batch["keep_offsets"] is not None
        keep = (batch["keep_offsets"], batch["keep_ids"]) if cut else None
        return self.head(selected, batch["targets"], tokens, params, weighting, keep)


MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "segment_ids",
    "logit_index",
    "targets",
    "keep_offsets",
    "keep_ids",
)
LOSS_INPUTS = ("advantages", "token_weight", "old_logp", "ref_logp")


def sampler_kl(sampler_logp: Tensor, logp: Tensor, live: Tensor) -> Tensor:
    """k3 estimate of KL(sampler || policy) at each token, float64 [N] in nats: samples come from
    the sampler. 0 where `live` is False, whatever the others hold."""
    # A finite stand-in keeps the estimator from turning one masked-out token into NaN.
    gap = torch.where(live, sampler_logp - logp, 0.0).double()
    return torch.expm1(-gap) + gap


@contextlib.contextmanager
def evaluating(engine: Any) -> Iterator[None]:
    """Passes in evaluation mode: the policy's own distribution, nothing drops out."""
    engine.train(False)
    try:
        yield
    finally:
        engine.train(True)


def stats_of(engine: Any, batch: Any) -> TokenStats:
    """Token statistics of a micro-batch without gradient, on the same code path as the loss."""
    with torch.no_grad():
        return TokenStats(*engine.forward({k: getattr(batch, k) for k in MODEL_INPUTS}))


def loss_of(
    engine: Any, batch: Any, params: PolicyLossParams, weighting: PolarityWeighting | None
) -> PolicyLossOutput:
    """Policy loss of a micro-batch; `loss` is the sum of token_weight times the token's loss."""
    return PolicyLossOutput(
        *engine.forward(
            {k: getattr(batch, k) for k in MODEL_INPUTS},
            {k: getattr(batch, k) for k in LOSS_INPUTS},
            params,
            weighting,
        )
    )
