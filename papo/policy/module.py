"""The policy as one module, so that one engine call is one pass: backbone, fused head and loss.

The backbone gives hidden states; only the positions that predict a response token reach the head,
whose logits exist a chunk of tokens at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from papo.model.attention import shared_prompts
from papo.model.load import decoder_of
from papo.model.recompute import recomputed_layers
from papo.policy.batch import LossInputs, ModelInputs
from papo_kernels import (
    Compute,
    FullTokenStats,
    Head,
    KeepSet,
    Objective,
    PolarityWeighting,
    PolicyLossOutput,
    TokenStats,
    policy_loss,
    token_stats,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Scoring(nn.Module):
    """Statistics, or the loss, of hidden states.

    A module of its own because the engine registers the head's parameters with it, so that ZeRO-3's
    hooks gather them around it and around nothing else.

    Args:
        head: of the language model, whose parameters it holds.
        temperature: of sampling; logp, entropy and polarity are all at this temperature.
        compute: backend and memory; its `logits_dtype` is set here.
        full_logits: logits in float32. None: where the device multiplies half-precision numbers
            into float32 (CUDA); a CPU would have to widen them first, at several times the cost.
    """

    def __init__(
        self, head: Head, temperature: float, compute: Compute, full_logits: bool | None
    ) -> None:
        super().__init__()
        self._head = head
        self._temperature = temperature
        self._compute = compute
        self._full_logits = full_logits

    @property
    def parameters_read(self) -> list[nn.Parameter]:
        """The head's weight and, where there is one, its bias."""
        held = (self._head.weight, self._head.bias)
        return [p for p in held if isinstance(p, nn.Parameter)]

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        tokens: LossInputs | None,
        objective: Objective | None,
        weighting: PolarityWeighting | None,
        keep: KeepSet | None = None,
    ) -> TokenStats | FullTokenStats | PolicyLossOutput:
        """The statistics, or with `tokens` the loss.

        `keep`: the ids that the sampler drew from, None for all.
        """
        # Some backbones leave their residual in float32 (Mamba).
        hidden = hidden.to(self._head.weight.dtype)
        full = hidden.is_cuda if self._full_logits is None else self._full_logits
        compute = replace(self._compute, logits_dtype=None if full else hidden.dtype)
        logits = self._head(hidden, keep=keep)
        if tokens is None:
            return token_stats(logits, targets, temperature=self._temperature, compute=compute)
        return policy_loss(
            logits,
            targets,
            **tokens,
            objective=objective,
            weighting=weighting,
            temperature=self._temperature,
            compute=compute,
        )


class Policy(nn.Module):
    """A causal LM whose forward pass gives token statistics or the policy loss of a micro-batch.

    Args:
        causal_lm: a transformers causal LM.
        temperature: sampling temperature; logp, entropy and polarity are all at this temperature.
        dropout: in passes with gradient, keep the model's dropout and whatever else it does only in
            training mode.
        compute: backend and workspace of the head, None for `Compute()`.
        full_logits: as for `Scoring`.
    """

    causal_lm: PreTrainedModel
    scoring: Scoring

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        *,
        temperature: float,
        dropout: bool = False,
        compute: Compute | None = None,
        full_logits: bool | None = None,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.dropout = dropout
        head = Head.of(causal_lm)
        self.scoring = Scoring(head, temperature, compute or Compute(), full_logits)

    def train(self, mode: bool = True) -> Policy:
        """Switch between passes with gradient and without; dropout only where it is kept."""
        super().train(mode and self.dropout)
        self.training = mode
        for layer in recomputed_layers(self.causal_lm):
            layer.training = mode
        return self

    def forward(
        self,
        batch: ModelInputs,
        tokens: LossInputs | None = None,
        objective: Objective | None = None,
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
        offsets, ids = batch["keep_offsets"], batch["keep_ids"]
        keep = None if offsets is None or ids is None else KeepSet(offsets, ids)
        return self.scoring(selected, batch["targets"], tokens, objective, weighting, keep)
