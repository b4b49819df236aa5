"""One call's passes over the chunks of its tokens: statistics, their gradient, the policy loss.

`ops/head.py` calls them, on the whole vocabulary or, with `split.py`, on one rank's shard of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from papo_kernels.backends import choose, several
from papo_kernels.backends.targets import check_target_values
from papo_kernels.token_loss import weightless
from papo_kernels.types import (
    ELSEWHERE,
    IGNORE_INDEX,
    STATE_SIZE,
    LossInputs,
    RowParams,
    TokenInputs,
    acc_dtype,
)

from .gradients import Gradients
from .keep import KeepMask
from .plan import Needs, Selection, Workspace, active_rows, default_workspace, make_plan
from .products import Projection, write_logits
from .split import Split


class Operands(NamedTuple):
    """The tensors of a call, as the operations' schemas order them; `hidden` is ``[N, D]``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    keep_offsets: Tensor | None
    keep_ids: Tensor | None

    def needs(self) -> Needs:
        """Which of them will be asked for a gradient."""
        grad = torch.is_grad_enabled()
        return Needs(*(grad and x is not None and x.requires_grad for x in self[:5]))


class PassOptions(NamedTuple):
    """`row.vocab_size` counts the whole vocabulary, `chunk_bytes` 0 is the default workspace."""

    row: RowParams
    backend: str
    lora_scaling: float
    logits_dtype: torch.dtype
    chunk_bytes: int


Step = Callable[[Selection, Tensor, Tensor | None], None]


class Passes:
    """The passes of one call. On a CPU a bad target or kept id raises before anything runs.

    Args:
        targets: ``[N]`` int64 ids of the whole vocabulary, or ``[N, k]`` for statistics.
        split: None where the weight holds all of it.
        checked: an earlier pass over the same targets and kept ids has not raised.
    """

    def __init__(
        self,
        operands: Operands,
        options: PassOptions,
        targets: Tensor,
        split: Split | None = None,
        checked: bool = False,
    ) -> None:
        self._operands, self._options, self._split = operands, options, split
        vocab_size = options.row.vocab_size
        if not checked:
            check_target_values(targets, vocab_size)
        self._first = split.first if split is not None else 0
        held = operands.weight.shape[0]
        cut = max(0, min(held, vocab_size - self._first))
        weight = operands.weight[:cut]
        self._head = Projection(
            weight if 1 in weight.stride() or cut == 0 else weight.contiguous(),
            None if operands.bias is None else operands.bias[:cut],
            operands.lora_a,
            None if operands.lora_b is None else operands.lora_b[:cut],
            options.lora_scaling,
        )
        # A shard without rows is treated as one masked column.
        self._columns = max(1, cut)
        self._row = options.row._replace(vocab_size=self._columns, sharded=split is not None)
        self._keep = None
        if operands.keep_offsets is not None and operands.keep_ids is not None:
            kept = (operands.keep_offsets, operands.keep_ids)
            # Of several ids none is known to be the sampled one, which a filter never removes.
            sampled = targets
            if targets.dim() == 2:
                sampled = torch.full_like(targets[:, 0], IGNORE_INDEX)
            self._keep = KeepMask(*kept, sampled, vocab_size, checked)
        self._targets = targets
        if split is not None:
            # A value that is no id at all stays out of range, so that the kernels refuse it: on a
            # GPU nothing has so far.
            known = (targets >= 0) & (targets < vocab_size)
            outside = torch.where(known, ELSEWHERE, targets.clamp(max=ELSEWHERE - 1))
            outside = torch.where(targets == IGNORE_INDEX, IGNORE_INDEX, outside)
            local = targets - self._first
            self._targets = torch.where((local >= 0) & (local < cut), local, outside)
        device, dtype = operands.hidden.device, options.logits_dtype
        self._backend = choose(options.backend or None, device, dtype)
        self._narrowing = operands.hidden.dtype in self._backend.capabilities.half_gradients

    # ---- passes ----

    def token_stats_fwd(self, full: bool = False) -> tuple[Tensor, ...]:
        """logp, entropy, unit_polarity, lse and the states of whole rows, as
        `several.token_stats_fwd`; then, if `full`, the sum of u over the vocabulary ``[N]`` float64
        (else ``[0]``)."""
        hidden, dtype = self._operands.hidden, acc_dtype(self._options.logits_dtype)
        targets, rows = self._targets, hidden.shape[0]
        state_size = STATE_SIZE + (targets.shape[1] if targets.dim() == 2 else 0)
        of_ids, of_rows = targets.shape, (rows,)
        outputs = [
            hidden.new_zeros(shape, dtype=dtype) for shape in (of_ids, of_rows, of_ids, of_rows)
        ]
        outputs.append(hidden.new_zeros((rows, state_size), dtype=torch.float64))
        sums = hidden.new_zeros(rows if full else 0, dtype=torch.float64)

        def step(chunk: Selection, logits: Tensor, dlogits: Tensor | None) -> None:
            row = self._row_of(chunk)
            values = several.token_stats_fwd(self._backend, logits, targets[chunk], row)
            for output, value in zip(outputs, values, strict=True):
                output[chunk] = value
            if full and self._head.columns:
                sums[chunk] = several.logit_sums(logits, row)

        self._run(step, self._ignored, None)
        if self._split is not None:
            outputs = self._finish(self._split.merge(outputs[-1]))
            self._split.add(sums)
        return *outputs, sums

    def token_stats_bwd(
        self, state: Tensor, grads: tuple[Tensor | None, ...], needs: Needs
    ) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight, bias, lora_a and lora_b for upstream gradients of logp,
        entropy, unit_polarity and lse; the chunks' logits are computed again."""

        def step(chunk: Selection, logits: Tensor, dlogits: Tensor | None) -> None:
            several.token_stats_bwd(
                self._backend,
                logits,
                self._targets[chunk],
                state[chunk],
                tuple(None if g is None else g[chunk] for g in grads),
                self._row_of(chunk),
                dlogits,
            )

        return self._run(step, self._ignored, needs)

    def policy_loss(
        self, inputs: LossInputs, needs: Needs
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """What `policy_loss_fwd` of a backend returns for all tokens, and the gradients of the loss
        as `token_stats_bwd` does."""
        tokens, objective, weighting = inputs.tokens, inputs.objective, inputs.weighting
        hidden, dtype = self._operands.hidden, acc_dtype(self._options.logits_dtype)
        rows = hidden.shape[0]
        outputs = [hidden.new_zeros(rows, dtype=dtype) for _ in range(7)]
        outputs.append(hidden.new_zeros(rows, dtype=torch.uint8))

        def step(chunk: Selection, logits: Tensor, dlogits: Tensor | None) -> None:
            targets, row, merged = self._targets[chunk], self._row_of(chunk), None
            if self._split is not None:
                local = self._backend.token_stats_fwd(logits, targets, row)[-1]
                merged = self._split.merge(local)
            values = self._backend.policy_loss_fwd(
                logits,
                targets,
                TokenInputs(*(None if x is None else x[chunk] for x in tokens)),  # type: ignore[arg-type]
                objective,
                weighting,
                row,
                dlogits,
                merged,
            )
            for output, value in zip(outputs, values, strict=True):
                output[chunk] = value

        ignored = self._ignored | weightless(tokens)
        grads = self._run(step, ignored, needs if any(needs) else None)
        return tuple(outputs), grads

    # ---- what they share ----

    def _run(self, step: Step, ignored: Tensor, needs: Needs | None) -> tuple[Tensor | None, ...]:
        """Call `step` on every chunk's logits. With `needs`, `step` writes their gradient as well,
        and the gradients of the head's inputs are formed from it."""
        hidden, columns = self._operands.hidden, self._columns
        active, dtype = active_rows(ignored), self._options.logits_dtype
        widest = columns  # of all shards
        if self._split is not None:
            widest = self._split.columns(self._options.row.vocab_size)
        weight_sum = 0
        if needs is not None and needs.weight:
            lower_halves = acc_dtype(dtype).itemsize - hidden.dtype.itemsize
            weight_sum = hidden.shape[1] * widest * lower_halves
        plan = make_plan(
            active.total,
            widest,
            hidden.shape[1],
            (hidden.dtype, dtype),
            needs is not None,
            self._options.chunk_bytes or default_workspace(hidden.device),
            weight_sum,
        )
        work = Workspace(hidden, active, plan, dtype, self._narrowing)
        grads = None
        if needs is not None:
            full = self._operands[1:5]
            grads = Gradients(hidden, self._head, full, needs, plan.slabs, self._split is not None)
        for slab in work.over_slabs():
            rows = hidden[slab]
            for part, chunk in work.over_chunks(slab):
                logits = work.logits(part.stop - part.start, columns)
                write_logits(self._head, rows[part], logits)
                if self._keep is not None and self._head.columns:
                    self._keep.apply(logits, chunk, self._first)
                if grads is None:
                    step(chunk, logits, None)
                else:
                    step(chunk, logits, work.kernel_target(part, columns))
                    work.keep_gradient(part, columns)
            if grads is not None:
                dlogits = work.dlogits(slice(0, rows.shape[0]), columns)
                skipped = None if active.ignored is None else active.ignored[slab]
                grads.add(slab, rows, dlogits, skipped)
        return (None,) * len(Needs._fields) if grads is None else grads.results()

    @property
    def _ignored(self) -> Tensor:
        """``[N]`` bool: no target of these rows counts."""
        ignored = self._targets == IGNORE_INDEX
        return ignored if ignored.dim() == 1 else ignored.all(dim=1)

    def _row_of(self, chunk: Selection) -> RowParams:
        """The parameters of a chunk's rows."""
        temperatures = self._row.temperatures
        if temperatures is None:
            return self._row
        return self._row._replace(temperatures=temperatures[chunk])

    def _finish(self, state: Tensor) -> list[Tensor]:
        """The statistics of whole rows from their merged states, which hold all that is needed."""
        dtype = self._options.logits_dtype
        unread = self._operands.hidden.new_empty((state.shape[0], 1), dtype=dtype)
        target = torch.where(self._ignored, IGNORE_INDEX, ELSEWHERE)
        row, of_row = self._row._replace(vocab_size=1), state[:, :STATE_SIZE].contiguous()
        outputs = list(self._backend.token_stats_fwd(unread, target, row, of_row)[:4])
        if self._targets.dim() == 2:
            outputs[0], outputs[2] = several.of_ids(state, self._targets, acc_dtype(dtype))
        return [*outputs, state]
