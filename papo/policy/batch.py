"""From scored completions to the tensors of one forward pass.

A row of a micro-batch is a prompt followed by one or more of its completions. Completions of one
row share the prompt, which is computed once, and do not see each other: token i of completion c
attends to the prompt and to tokens <= i of c, at the position it had when it was sampled. The
hidden state at the prompt's last token predicts the first token of every completion of the row. A
completion's last token is never fed: nothing reads its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from papo.types import KeptIds
from papo_kernels import Sequences


@dataclass(frozen=True)
class TrainingSequence:
    """One completion with what the loss needs to know of it.

    Attributes:
        weight: token weight of each of its tokens: mask times normalizer of the aggregation.
        group: index of its prompt among all that the step samples, -1 for `IDLE`.
        old_logp, ref_logp: float32 [len(response_ids)] or None.
        factor: the same; multiplies the advantage token by token.
        unit_polarity: the same; what `factor` was formed from, where that is not the local one.
        kept: the ids that top-k and top-p left to draw each token from, None where neither was on.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    sampler_logp: tuple[float, ...]
    advantage: float
    weight: float
    group: int
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    factor: Tensor | None = None
    unit_polarity: Tensor | None = None
    kept: KeptIds | None = None


# Contributes exactly nothing, for a rank that has run out of sequences before the others. It has
# every field that a loss may ask for: such a rank has no real sequence to show which are needed.
IDLE = TrainingSequence(
    (0,),
    (0,),
    (0.0,),
    advantage=0.0,
    weight=0.0,
    group=-1,
    old_logp=torch.zeros(1),
    ref_logp=torch.zeros(1),
    kept=KeptIds(torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)),
)


class ModelInputs(TypedDict):
    """What of a `MicroBatch` gives the logits of its tokens."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    segment_ids: Tensor | None
    logit_index: Tensor
    targets: Tensor
    keep_offsets: Tensor | None
    keep_ids: Tensor | None


class LossInputs(TypedDict):
    """What of a `MicroBatch` only the loss reads: arguments of `papo_kernels.policy_loss`."""

    advantages: Tensor
    token_weight: Tensor
    old_logp: Tensor | Sequences | None
    ref_logp: Tensor | None


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one forward pass: B rows of T positions, N response tokens.

    Attributes:
        input_ids, position_ids: int64 [B, T].
        attention_mask: int64 [B, T], 1 for tokens and 0 for the padding on their right.
        logit_index: int64 [N], flat position whose hidden state predicts the token.
        targets: int64 [N].
        completion: int64 [N], number of the token's completion in the micro-batch.
        advantages, token_weight, sampler_logp: float32 [N].
        old_logp, ref_logp: float32 [N] or None.
        factor: float32 [N] or None, polarity weights that `advantages` already contain
            (weighting.source: rollout).
        unit_polarity: float32 [N] or None, shared unit polarity that these weights were formed from
            (weighting.polarity: shared).
        keep_offsets: int64 [N + 1] or None, keep_ids: int64 [nnz] or None: what top-k and top-p
            kept for each token, as `papo_kernels.KeepSet` has it.
        segment_ids: int64 [B, T], 0 for a prompt, 1 and on for its completions, -1 for padding;
            None where no row is shared.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    logit_index: Tensor
    targets: Tensor
    completion: Tensor
    advantages: Tensor
    token_weight: Tensor
    sampler_logp: Tensor
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    factor: Tensor | None = None
    unit_polarity: Tensor | None = None
    keep_offsets: Tensor | None = None
    keep_ids: Tensor | None = None
    segment_ids: Tensor | None = None

    @property
    def live(self) -> Tensor:
        """bool [N], the tokens that train."""
        return self.token_weight > 0

    def model_inputs(self) -> ModelInputs:
        """Its fields of these names."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "segment_ids": self.segment_ids,
            "logit_index": self.logit_index,
            "targets": self.targets,
            "keep_offsets": self.keep_offsets,
            "keep_ids": self.keep_ids,
        }

    def loss_inputs(self, ratio_level: str = "token") -> LossInputs:
        """Its fields of these names.

        `ratio_level`: of the objective; the ratio of a sequence is that of a completion.
        """
        old_logp = self.old_logp
        return {
            "advantages": self.advantages,
            "token_weight": self.token_weight,
            "old_logp": (
                old_logp if ratio_level == "token" else Sequences(old_logp, self.completion)
            ),
            "ref_logp": self.ref_logp,
        }

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def rows_of(sequences: Sequence[TrainingSequence], max_row_tokens: int) -> list[list[int]]:
    """Indices of neighbors with the same prompt, in rows of at most `max_row_tokens`.

    A dense mask makes attention quadratic in the row's length: past some length, sharing the prompt
    costs more than it saves. `max_row_tokens` is that length; with 0 nothing is shared.
    """
    rows: list[list[int]] = []
    length = 0
    for i, seq in enumerate(sequences):
        fed = len(seq.response_ids) - 1
        same = bool(rows) and sequences[rows[-1][0]].prompt_ids == seq.prompt_ids
        if same and length + fed <= max_row_tokens:
            rows[-1].append(i)
            length += fed
        else:
            rows.append([i])
            length = len(seq.prompt_ids) + fed
    return rows


def collate(
    sequences: Sequence[TrainingSequence],
    *,
    pad_id: int,
    max_row_tokens: int,
    width_multiple: int = 1,
) -> MicroBatch:
    """One forward pass's tensors for `sequences`, their tokens in the order given.

    Args:
        width_multiple: rows are padded to a multiple of so many positions.

    Raises:
        ValueError: a sequence without prompt or response tokens, or no sequence at all.
    """
    if not sequences:
        raise ValueError("sequences: at least one is needed, got none")
    for i, seq in enumerate(sequences):
        if not seq.prompt_ids or not seq.response_ids:
            raise ValueError(
                f"sequences[{i}]: expected at least one prompt and one response token, got "
                f"{len(seq.prompt_ids)} and {len(seq.response_ids)}"
            )
    rows = rows_of(sequences, max_row_tokens)
    width = max(
        len(sequences[r[0]].prompt_ids) + sum(len(sequences[i].response_ids) - 1 for i in r)
        for r in rows
    )
    width = -(-width // width_multiple) * width_multiple
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    position_ids = torch.zeros((len(rows), width), dtype=torch.int64)
    segment = torch.full((len(rows), width), -1, dtype=torch.int64)
    logit_index: list[Tensor] = []
    for b, row in enumerate(rows):
        prompt = sequences[row[0]].prompt_ids
        end = len(prompt)
        input_ids[b, :end] = torch.tensor(prompt)
        position_ids[b, :end] = torch.arange(end)
        segment[b, :end] = 0
        for k, i in enumerate(row, start=1):
            response = sequences[i].response_ids
            start, end = end, end + len(response) - 1
            input_ids[b, start:end] = torch.tensor(response[:-1], dtype=torch.int64)
            position_ids[b, start:end] = torch.arange(len(prompt), len(prompt) + end - start)
            segment[b, start:end] = k
            first = torch.tensor([b * width + len(prompt) - 1])
            logit_index.append(torch.cat([first, b * width + torch.arange(start, end)]))
    shared = any(len(row) > 1 for row in rows)
    return MicroBatch(
        input_ids,
        position_ids,
        (segment >= 0).to(torch.int64),
        torch.cat(logit_index),
        **_token_tensors(sequences),
        segment_ids=segment if shared else None,
    )


def _token_tensors(sequences: Sequence[TrainingSequence]) -> dict[str, Any]:
    lengths = torch.tensor([len(s.response_ids) for s in sequences])

    def per_sequence(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths)

    def per_token(parts: list[Tensor | None]) -> Tensor | None:
        return (
            None
            if any(p is None for p in parts)
            else torch.cat([p for p in parts if p is not None])
        )

    advantages = per_sequence([s.advantage for s in sequences])
    factor = per_token([s.factor for s in sequences])
    return {
        "targets": torch.tensor([t for s in sequences for t in s.response_ids], dtype=torch.int64),
        "completion": torch.arange(len(sequences)).repeat_interleave(lengths),
        "advantages": advantages if factor is None else advantages * factor,
        "token_weight": per_sequence([s.weight for s in sequences]),
        "sampler_logp": torch.tensor(
            [x for s in sequences for x in s.sampler_logp], dtype=torch.float32
        ),
        "old_logp": per_token([s.old_logp for s in sequences]),
        "ref_logp": per_token([s.ref_logp for s in sequences]),
        "factor": factor,
        "unit_polarity": per_token([s.unit_polarity for s in sequences]),
        **_kept_tensors([s.kept for s in sequences]),
    }


def _kept_tensors(kept: Sequence[KeptIds | None]) -> dict[str, Tensor]:
    """`keep_offsets` and `keep_ids`, or neither where the sampler cut nothing away."""
    parts = [k for k in kept if k is not None]
    if not parts:
        return {}
    counts = torch.cat([k.counts for k in parts])
    return {
        "keep_offsets": nn.functional.pad(counts.cumsum(0), (1, 0)),
        "keep_ids": torch.cat([k.ids for k in parts]).to(torch.int64),
    }


@dataclass
class Batcher:
    """Makes a rank's micro-batches.

    Attributes:
        pad_id: fills rows up.
        max_row_tokens: see `rows_of`; set to 0, completions share no rows from then on.
        device: of the tensors.
        width_multiple: see `collate`.
    """

    pad_id: int
    max_row_tokens: int
    device: torch.device
    width_multiple: int = 1

    def batch(self, sequences: Sequence[TrainingSequence]) -> MicroBatch:
        """One forward pass's tensors for `sequences`."""
        made = collate(
            sequences,
            pad_id=self.pad_id,
            max_row_tokens=self.max_row_tokens,
            width_multiple=self.width_multiple,
        )
        return made.to(self.device)


def micro_batches(
    sequences: Sequence[TrainingSequence], size: int, *, count: int
) -> Iterator[Sequence[TrainingSequence]]:
    """`sequences` in pieces of `size`, then idle pieces up to `count`.

    Every rank must run the same number of forward and backward passes or ZeRO-3's collectives hang;
    an idle piece is `IDLE` alone.
    """
    pieces = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    yield from pieces
    for _ in range(count - len(pieces)):
        yield [IDLE]
