"""Sampling with transformers' `generate`: in batches, with the prompt of a group computed once.

The model that samples has whole weights and no ZeRO hooks (`Engine.inference_model`), so nothing is
gathered per token and ranks may stop at different lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from papo.errors import PapoError
from papo.model.load import decoder_of
from papo.types import Completion, KeptIds, Problem
from papo_kernels import token_stats

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from papo.config import RolloutConfig

# Tokens for which random numbers are made at once: most completions need no more.
_TOKENS_AHEAD = 64


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off; `batch_size` 0 samples all at once.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 0

    @classmethod
    def of(cls, rollout: RolloutConfig, **changes: Any) -> SamplingParams:
        """From the config's `rollout` section, with `changes`."""
        return cls(**{f.name: getattr(rollout, f.name) for f in fields(cls)} | changes)


def _uniforms(
    seeds: Sequence[int], copies: int, taken: slice, device: torch.device
) -> Iterator[Tensor]:
    """A number in [0, 1) for each row, token after token: float64 [B, 1].

    Each problem has a generator of its own, and each of its copies a column of what that draws. So
    a completion's numbers depend neither on the other problems of the call nor on how the copies
    are split among calls. Generators of the CPU give the same numbers for every device.

    Args:
        seeds: of the call's problems.
        copies: of each problem, over all calls.
        taken: those of this call.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        drawn = [
            torch.rand(_TOKENS_AHEAD, copies, generator=g, dtype=torch.float64)[:, taken]
            for g in generators
        ]
        yield from torch.cat(drawn, dim=1).to(device).unsqueeze(-1)


class _Draw(LogitsProcessor):
    """Draws the next token and leaves it the only one with a finite score, for generate's argmax.

    generate's own sampling draws an exponential number for every logit from a single-threaded
    generator, which is a fifth of the time of a CPU rollout. One uniform number per row and the
    cumulative distribution do the same. The token is known here, so its log-probability is read
    from the same logits.

    Args:
        params: how to sample.
        eos_ids: a row that has drawn one of them has ended; what it draws after that is dropped.
        uniforms: float64 [B, 1] in [0, 1) per step, on the scores' device.

    Attributes:
        logp: float32 [B] per step, log-probability (nats) of the drawn tokens in the distribution
            that they were drawn from.
    """

    def __init__(
        self, params: SamplingParams, eos_ids: Sequence[int], uniforms: Iterator[Tensor]
    ) -> None:
        self._uniforms = uniforms
        self._temperature = params.temperature
        self._eos = eos_ids
        self._ended: Tensor | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._cuts: list[LogitsProcessor] = []
        if params.top_k:
            self._cuts.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            self._cuts.append(TopPLogitsWarper(params.top_p))
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._temperature:
            scores = scores / self._temperature
        for cut in self._cuts:
            scores = cut(input_ids, scores)
        tokens = scores.argmax(-1) if self._temperature == 0 else self._drawn(scores)
        self.logp.append(token_stats(scores, tokens).logp)
        if self._cuts:
            self._keep(scores, tokens)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def _keep(self, scores: Tensor, tokens: Tensor) -> None:
        """Record which ids the cuts left to rows that go on, and which rows this step ends."""
        kept = scores > -torch.inf
        # A row of NaN keeps nothing, but a drawn id must be among the kept ones.
        kept.scatter_(1, tokens[:, None], True)
        if self._ended is not None:
            kept &= ~self._ended[:, None]
        self._kept.append((kept.sum(1).cpu(), kept.nonzero()[:, 1].to("cpu", torch.int32)))
        ends = torch.isin(tokens, torch.tensor(self._eos, device=tokens.device))
        self._ended = ends if self._ended is None else self._ended | ends

    def kept(self, lengths: Sequence[int]) -> list[KeptIds | None]:
        """Each row's kept ids in its first `lengths[row]` steps; None without top-k and top-p."""
        if not self._cuts:
            return [None] * len(lengths)
        counts = torch.stack([c for c, _ in self._kept])
        parts = [ids.split(c.tolist()) for c, ids in self._kept]
        return [
            KeptIds(counts[:n, row].clone(), torch.cat([parts[t][row] for t in range(n)]))
            for row, n in enumerate(lengths)
        ]

    def _drawn(self, scores: Tensor) -> Tensor:
        # In float64, so that rounding leaves every token its probability.
        cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        # The factor keeps the product below the total where it rounds up.
        below = next(self._uniforms) * cumulative[:, -1:] * (1.0 - 2.0**-52)
        drawn = torch.searchsorted(cumulative, below, right=True).squeeze(1)
        # A row of NaN finds no place: the id stays in range, and the log-prob shows the NaN.
        return drawn.clamp(max=scores.shape[1] - 1)


class HFSampler:
    """Completions of problems from a transformers model.

    Args:
        tokenizer: the policy's tokenizer.
        eos_ids: token ids that end a completion.
        pad_id: fills the positions after a completion's end, which is never inferred from it.
        skip_special_tokens: leave them out of a completion's text, except for those around its
            thinking, which verifiers look for.

    Attributes:
        prefills: whether the prompt of a group is computed once; False for models whose cache
            cannot be repeated.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        pad_id: int,
        skip_special_tokens: bool = True,
    ) -> None:
        self.prefills = True
        self._tokenizer = tokenizer
        self._eos = tuple(eos_ids)
        self._pad = pad_id
        self._skip_special = skip_special_tokens
        special = set(getattr(tokenizer, "all_special_ids", ()))
        added = getattr(tokenizer, "added_tokens_encoder", {})
        self._shown = special.intersection(added.get(t) for t in ("<think>", "</think>"))
        self._hidden = special - self._shown

    @torch.inference_mode()
    def sample(
        self,
        model: PreTrainedModel,
        problems: Sequence[Problem],
        copies: int,
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[Completion]:
        """`copies` completions of every problem, in the problems' order.

        Those of a problem depend on the model, the problem, `copies`, `params` and its seed alone,
        but for rounding: neither on what came before nor on what else is sampled.

        Args:
            model: a causal LM with whole weights.
            seeds: one per problem.
        """
        device = next(model.parameters()).device
        completions: list[Completion] = []
        for part, taken in self._calls(len(problems), copies, params.batch_size):
            uniforms = _uniforms(seeds[part], copies, taken, device)
            draw = _Draw(params, self._eos, uniforms)
            n = taken.stop - taken.start
            completions += self._generate(model, problems[part], n, params.max_new_tokens, draw)
        return completions

    @staticmethod
    def _calls(problems: int, copies: int, batch_size: int) -> Iterator[tuple[slice, slice]]:
        """Which problems and copies each generate call samples; a problem's copies are split only
        if they must be."""
        limit = batch_size or max(1, problems) * copies
        at_once = max(1, limit // copies)
        for start in range(0, problems, at_once):
            for done in range(0, copies, limit):
                yield slice(start, start + at_once), slice(done, min(done + limit, copies))

    def _generate(
        self,
        model: PreTrainedModel,
        problems: Sequence[Problem],
        copies: int,
        max_new_tokens: int,
        draw: _Draw,
    ) -> list[Completion]:
        device = next(model.parameters()).device
        prompts = [p.prompt_ids for p in problems]
        # On a CPU one column of padding more than needed: for a batch without padding transformers
        # drops the mask and takes a kernel that is four times slower for single queries.
        width = max(len(p) for p in prompts) + (device.type == "cpu")
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        cache = self._prefill(model, ids, mask, copies) if self.prefills else None
        generate: Any = model.generate  # not every PreTrainedModel has it
        out = generate(
            input_ids=ids.repeat_interleave(copies, 0),
            attention_mask=mask.repeat_interleave(copies, 0),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(self._eos),
            pad_token_id=self._pad,
            logits_processor=LogitsProcessorList([draw]),
        )[:, width:]
        # generate may have drawn a few tokens more than it returns.
        logp = torch.stack(draw.logp[: out.shape[1]], dim=1)
        if logp.isnan().any():
            raise PapoError(
                "the policy gives no token a probability (its log-probs are NaN): it has diverged; "
                "go on from an earlier checkpoint with a lower optim.lr"
            )
        responses = [self._until_the_end(row) for row in out.tolist()]
        kept = draw.kept([len(ids) for ids in responses])
        return [
            self._completion(problems[i // copies], *row)
            for i, row in enumerate(zip(responses, logp.tolist(), kept, strict=True))
        ]

    @staticmethod
    def _prefill(model: PreTrainedModel, ids: Tensor, mask: Tensor, copies: int) -> DynamicCache:
        """Keys and values of the prompts without their last token, repeated for each completion.

        `generate` computes the last token itself, because it needs its logits.
        """
        cache = DynamicCache(config=model.config)
        # Linear attention would take a row of padding alone for a prompt.
        if mask[:, :-1].any():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            decoder_of(model)(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                past_key_values=cache,
                use_cache=True,
            )
            if copies > 1:
                # Layers of linear attention have no batch_repeat_interleave.
                rows: Any = torch.arange(len(ids), device=ids.device)
                cache.reorder_cache(rows.repeat_interleave(copies))
        return cache

    def _until_the_end(self, ids: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(ids) if token in self._eos), len(ids))
        return ids[:end]

    def _completion(
        self, problem: Problem, ids: list[int], logp: list[float], kept: KeptIds | None
    ) -> Completion:
        truncated = ids[-1] not in self._eos
        text_ids = ids if truncated else ids[:-1]
        return Completion(
            problem=problem,
            response_ids=tuple(ids),
            sampler_logp=tuple(logp[: len(ids)]),
            truncated=truncated,
            text=self._text(text_ids),
            kept=kept,
        )

    def _text(self, ids: Sequence[int]) -> str:
        if self._skip_special and self._shown.intersection(ids):
            kept = [i for i in ids if i not in self._hidden]
            return str(self._tokenizer.decode(kept, skip_special_tokens=False))
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=self._skip_special))


def greedy(params: SamplingParams) -> SamplingParams:
    """`params` at temperature 0."""
    return replace(params, temperature=0.0, top_p=1.0, top_k=0)
