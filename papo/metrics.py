"""The run's figures on disk: metrics.jsonl and TensorBoard, and completions.jsonl. `METRICS` is the
one table of names.

Written by rank 0 alone, every row once, also across kill and resume. `python -m papo.metrics`
prints docs/metrics.md.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from papo.errors import PapoError

log = logging.getLogger(__name__)


class Metric(NamedTuple):
    """`unit` is empty for counts and plain numbers; shares are of 1."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "reward/mean": Metric("", "Mean reward of everything sampled, masked rows left out."),
    "reward/std": Metric("", "Standard deviation of the same rewards."),
    "reward/accuracy": Metric("share", "Completions with reward 1."),
    "reward/zero_spread_groups": Metric(
        "share",
        "Groups whose rewards are all equal (largest minus smallest <= 1e-6): advantages 0, "
        "nothing learnt.",
    ),
    "reward/errors": Metric("", "Completions whose verifier raised; scored 0."),
    "reward/timeouts": Metric(
        "", "Completions whose verifier was killed at `reward.timeout_s`; scored 0."
    ),
    "reward/invalid": Metric("", "Completions whose verifier returned None or NaN; masked."),
    "response/length": Metric(
        "tokens", "Mean response length, the end-of-sequence token included."
    ),
    "response/truncated": Metric("share", "Completions that ran into `rollout.max_new_tokens`."),
    "rollout/rounds": Metric(
        "", "Sampling rounds of the step; above 1 with dynamic sampling alone."
    ),
    "entropy/mean": Metric(
        "nats",
        "Mean entropy of the policy at the sampling temperature, over the tokens that train; null "
        "where there are none.",
    ),
    "entropy/predicted_delta": Metric(
        "nats per unit step",
        "Mean of weight times polarity over the measured tokens: the entropy change the update "
        "asks for, to first order, "
        "per unit of step in logit space. Compare its sign and trend, not its size, with the "
        "measured one.",
    ),
    "entropy/measured_delta": Metric(
        "nats", "Entropy after the step minus before it, mean over the same tokens."
    ),
    "phase/phi": Metric("", "Phase used by this step, in [-1, 1]; above 0 asks for more entropy."),
    "phase/fast": Metric("nats", "Fast average of the mean entropy, this step included."),
    "phase/slow": Metric("nats", "Slow average of the mean entropy, this step included."),
    "phase/reference": Metric("nats", "Reference entropy H*."),
    "weighting/lambda_phi": Metric(
        "", "`weighting.strength` times the phase: how far the branches' weights move apart."
    ),
    "weighting/sigma": Metric("", "Running RMS of polarity used by this step."),
    "weighting/scale": Metric(
        "", "Pressure-conserving scale s used by this step; 1 without `weighting.conserve`."
    ),
    "polarity/expanding_share": Metric(
        "share",
        "Tokens of the step's first update that expand entropy (polarity above 0, outside the dead "
        "zone, not clipped).",
    ),
    "polarity/contracting_share": Metric(
        "share", "The same for tokens that contract it (polarity below 0)."
    ),
    "polarity/expanding_pressure_before": Metric(
        "share", "The expanding branch's part of the summed absolute advantage, unweighted."
    ),
    "polarity/contracting_pressure_before": Metric(
        "share", "The contracting branch's part of it, unweighted."
    ),
    "polarity/expanding_pressure_after": Metric(
        "share", "The expanding branch's part after weighting."
    ),
    "polarity/contracting_pressure_after": Metric(
        "share", "The contracting branch's part after weighting."
    ),
    "loss/policy": Metric(
        "", "The policy loss. On-policy it is near 0 by construction: see below."
    ),
    "loss/advantage_abs": Metric(
        "", "Mean absolute advantage per token; 0 means there is nothing to learn from."
    ),
    "loss/ratio": Metric("", "Mean importance ratio; 1 with one update per rollout."),
    "loss/clip_low": Metric(
        "share", "Tokens with negative advantage whose gradient is clipped away."
    ),
    "loss/clip_high": Metric(
        "share", "Tokens with positive advantage whose gradient is clipped away."
    ),
    "loss/sampler_kl": Metric(
        "nats",
        "KL from the sampler to the policy on sampled tokens (k3): how far sampling and training "
        "disagree.",
    ),
    "optim/grad_norm": Metric(
        "",
        "Gradient norm of the step's last update, before clipping; null where it is not finite.",
    ),
    "optim/lr": Metric("", "Learning rate of the step's last update."),
    "optim/skipped": Metric(
        "",
        "Updates of the step that were skipped: loss or gradient was not finite, or no token was "
        "left to train on.",
    ),
    "time/step": Metric("s", "The whole step, slowest rank (as all times)."),
    "time/gather": Metric("s", "Gathering partitioned weights for sampling, once a step."),
    "time/rollout": Metric("s", "Sampling."),
    "time/reward": Metric("s", "Waiting for verifiers."),
    "time/stats": Metric(
        "s", "Forward passes of the old and the reference policy, where something needs them."
    ),
    "time/train": Metric("s", "Forward, backward and optimizer."),
    "time/measure": Metric("s", "Forward pass for the measured entropy change."),
    "throughput/tokens_per_second": Metric(
        "tokens/s", "Sampled tokens of all ranks over the time of the step."
    ),
    "memory/peak_rss": Metric("GiB", "Peak resident memory of the largest rank so far."),
    "memory/peak_device": Metric(
        "GiB", "Peak accelerator memory of the largest rank so far; absent on a CPU."
    ),
    "eval/accuracy": Metric(
        "share", "Held-out problems: mean over problems and samples at temperature 1."
    ),
    "eval/pass_at_k": Metric("share", "Held-out problems solved by at least one of the samples."),
    "eval/greedy": Metric("share", "Held-out problems solved by greedy decoding."),
    "eval/truncated": Metric("share", "Held-out samples that ran into `rollout.max_new_tokens`."),
}


class JsonLines:
    """A file of one JSON object a line, each with a `step`. A line that a killed process left
    unfinished is dropped.

    Args:
        path: created with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        if path.exists():
            self.keep(lambda row: True)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows and hand them to the operating system: they survive the process.

        Raises:
            PapoError: they cannot be written (disk full, folder gone).
        """
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (kept open)
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Keep the rows for which `wanted` is true; the file is replaced whole or not at all."""
        if not self.path.exists():
            return
        self.close()
        before = self.path.read_bytes()
        after = "".join(
            line for line in _lines(before) if (row := _row(line)) is not None and wanted(row)
        ).encode()
        if after == before:
            return
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            partial.write_bytes(after)
            os.replace(partial, self.path)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a write that has failed, and was told, before
                self._file.close()
            self._file = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The finished rows of a file, none where there is no file."""
    if not path.exists():
        return []
    return [row for line in _lines(path.read_bytes()) if (row := _row(line)) is not None]


def _lines(data: bytes) -> list[str]:
    """The finished lines. `splitlines` would also cut a completion's text, at U+2028 and others."""
    *finished, _cut_off = data.decode("utf-8", errors="replace").split("\n")
    return [line + "\n" for line in finished]


def _row(line: str) -> dict[str, Any] | None:
    """The row of a line; None where it holds none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _cannot_write(path: Path, error: OSError) -> PapoError:
    return PapoError(
        f"cannot write {path}: {error.strerror}; free some space or choose another output_dir"
    )


def _row_id(row: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    return row["step"], frozenset(row)


class MetricsWriter:
    """Figures of steps and evaluations to metrics.jsonl and TensorBoard.

    Args:
        run_dir: folder of the run; it exists.
        tensorboard: also write `run_dir/tensorboard`.
        enabled: False on every rank but 0: all methods then do nothing.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, enabled: bool) -> None:
        self._lines = JsonLines(run_dir / "metrics.jsonl") if enabled else None
        self._folder = run_dir / "tensorboard" if enabled and tensorboard else None
        self._board: Any = None
        self._resumed_after: int | None = None
        self._written = self._row_ids()

    def _row_ids(self) -> set[tuple[int, frozenset[str]]]:
        """Step and names of every row in the file: what makes a row the same row."""
        return {_row_id(row) for row in read_rows(self._lines.path)} if self._lines else set()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row. A figure that is not finite becomes null. A row of the same step and names is
        replaced.

        Raises:
            ValueError: a name that `METRICS` does not document.
            PapoError: the row cannot be written.
        """
        unknown = sorted(set(values) - set(METRICS))
        if unknown:
            raise ValueError(
                f"values: expected names documented in papo.metrics.METRICS, got {unknown}"
            )
        if self._lines is None:
            return
        row: dict[str, Any] = {"step": step}
        row |= {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        if _row_id(row) in self._written:
            self._lines.keep(lambda old: _row_id(old) != _row_id(row))
        self._lines.append([row])
        self._written.add(_row_id(row))
        if self._folder is not None:
            try:
                board = self._open_board()
                for name, value in values.items():
                    board.add_scalar(name, value, step)
                board.flush()
            except OSError as error:
                raise _cannot_write(self._folder, error) from error

    def _open_board(self) -> Any:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if self._resumed_after is None else self._resumed_after + 1
            self._board = SummaryWriter(str(self._folder), purge_step=purge)
        return self._board

    def truncate_after(self, step: int) -> None:
        """Drop what was written after `step`, before a resumed run writes it again; -1 drops
        everything."""
        if self._lines is not None:
            self._lines.keep(lambda row: row["step"] <= step)
            self._written = self._row_ids()
            self._resumed_after = step

    def close(self) -> None:
        """Close the files."""
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
            self._board = None


class CompletionsWriter:
    """Every sampled completion as a row of completions.jsonl.

    Args:
        run_dir: folder of the run; it exists.
        enabled: False on every rank but 0, and where completions are not wanted.
    """

    def __init__(self, run_dir: Path, enabled: bool) -> None:
        self._lines = JsonLines(run_dir / "completions.jsonl") if enabled else None

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows of a step (keys of `telemetry.completion_rows`); `step` is added.

        Raises:
            PapoError: they cannot be written.
        """
        if self._lines is not None:
            self._lines.append({"step": step, **row} for row in rows)

    def truncate_after(self, step: int) -> None:
        """Drop the rows of steps after `step`; -1 drops everything."""
        if self._lines is not None:
            self._lines.keep(lambda row: row["step"] <= step)

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()


def reference_page() -> str:
    """The Markdown page of every name."""
    rows = [f"| `{name}` | {metric.unit} | {metric.meaning} |" for name, metric in METRICS.items()]
    return _PAGE.format(table="\n".join(rows))


_PAGE = """# Metrics

Made by `python -m papo.metrics > docs/metrics.md` from `papo.metrics.METRICS`; do not edit.

Every step writes one row to `metrics.jsonl` in the run's folder, and the same names to TensorBoard
(`tensorboard --logdir runs`). An evaluation writes a row of its own, with the step after which it
ran. Figures cover all ranks; a figure that is not finite is written as null.

| name | unit | meaning |
|---|---|---|
{table}

## The loss is 0

That is what a healthy on-policy run shows. Advantages are centred within each group and the ratio
is 1, so the loss's value is minus the token mean of the advantages, near 0, while its gradient is
not. Look at `optim/grad_norm`, `loss/advantage_abs` and `reward/mean` instead. Nothing is learnt
only where `loss/advantage_abs` and `optim/grad_norm` are 0 as well: then
`reward/zero_spread_groups` is 1, all groups were solved completely or not at all. Choose easier or
harder problems, or set `dynamic_sampling.enabled`.

## Completions

`completions.jsonl` holds every sampled completion once: `step`, `group` (index of the prompt in the
step), `uid` of the problem, `prompt`, `answer` (the reference), `text`, `length` in tokens,
`truncated`, `reward` (null where masked), `status` (`ok`, `error`, `timeout`, `invalid`) and
`advantage`.
"""


if __name__ == "__main__":
    print(reference_page(), end="")
