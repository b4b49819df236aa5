"""Host side of every kernel: what the calls for one kind of row share, and how kernels are started.

A kernel is compiled once for each combination of dtypes and fields of ``tile.Variant``, and for
nothing else. So Triton must not specialize on pointers and integers: top-level ones are named in
``do_not_specialize``, pointers in tuples are 16-byte aligned, and numbers in tuples are floats.
Later calls start the compiled kernel directly. Triton's own launch looks at every argument again,
which takes longer than many a kernel runs.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from papo_kernels.types import RowParams

from . import config
from .config import Config, candidates
from .source import LOGITS, PARTS, Numbers, Rows, segments_kernel
from .tile import N_SUMS, WORD_BYTES, Variant

__all__ = ["Plan", "candidates", "clear_config", "plan"]

MAX_PARTS = 65_535  # programs along a grid's second axis
CAPPED_REGISTERS = 128  # a soft cap takes about that many


class Flags(NamedTuple):
    """The fields of ``tile.Variant`` that a plan leaves open."""

    aligned: bool = False
    same_words: bool = False
    source: int = LOGITS.value
    has_gradient: bool = False
    has_squares: bool = False
    has_temperatures: bool = False
    surrogate: str = ""
    kl_estimator: str = ""
    kl_slope_of_k2: bool = False
    kl_ratio: bool = False


class Plan:
    """What calls that differ only in their tensors share.

    Attributes:
        config: how rows are read.
        numbers: those that all kernels take.
        n_segments: per row.
        few: with fewer rows than this, each row is split.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, row: RowParams) -> None:
        self.device, self.row = device, row
        self.index = device.index if device.type == "cuda" else None
        self.config = config.config(device, dtype, row.vocab_size)
        t, elsewhere = row.temperature, -math.inf if row.sharded else math.nan
        high = ctypes.c_float(1.0 / t).value
        scales = (high, 1.0 / t - high, math.log2(math.e) / t)
        softcap = float(row.softcap)
        inv_softcap = 1.0 / softcap if softcap > 0.0 else 0.0
        self.numbers = Numbers(*scales, softcap, inv_softcap, elsewhere)
        self.n_segments = count_segments(self.config, row.vocab_size, dtype.itemsize)
        self.few = (
            self.config.programs * count_multiprocessors(device)
            if self.n_segments <= MAX_PARTS
            else 0
        )
        self._started: dict[tuple[str, Flags, Any], tuple[CompiledKernel, Variant]] = {}

    def count_parts(self, n_rows: int) -> int:
        """Programs per row: one where the rows are enough for the device, else one per segment."""
        return 1 if n_rows >= self.few else self.n_segments

    def variant(self, flags: Flags) -> Variant:
        lanes, vectors, segment = self.config[:3]
        return variant(Variant(lanes, vectors, segment, self.row.softcap > 0.0, *flags))

    def run(
        self, kernel: Any, flags: Flags, dtype: Any, programs: int, parts: int, *args: Any
    ) -> None:
        """Starts `programs` times `parts` programs.

        Args:
            dtype: of a second matrix, None if there is none. The dtypes of all other arguments
                follow from the plan and the flags.
        """
        if programs == 0:
            return
        key = (kernel.__name__, flags, dtype)
        started = self._started.get(key)
        # Triton launches on the current device and its current stream.
        if self.index is not None and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.index):
                self.run(kernel, flags, dtype, programs, parts, *args)
        elif started is not None:
            compiled, how = started
            compiled[programs, parts, 1](*args, how)
        else:
            hash_all()
            how = self.variant(flags)
            compiled = first_launch(kernel, self, (programs, parts, 1), *args, how)
            if isinstance(compiled, CompiledKernel):
                self._started[key] = compiled, how


def plan(device: torch.device, dtype: torch.dtype, row: RowParams) -> Plan:
    if row.temperatures is not None:
        row = row._replace(temperature=1.0, temperatures=None)
    return _plan(device, dtype, row)


@lru_cache(maxsize=256)
def _plan(device: torch.device, dtype: torch.dtype, row: RowParams) -> Plan:
    return Plan(device, dtype, row)


def clear_config() -> None:
    """Makes the next call read ``PAPO_TRITON_CONFIG`` again."""
    config.clear()
    _plan.cache_clear()


@cache
def variant(values: Variant) -> Variant:
    return Variant(*map(tl.constexpr, values))


@cache
def count_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter: so few that tests reach whole and split rows
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# ---- splitting rows -------------------------------------------------------------------------


def count_segments(config: Config, vocab_size: int, itemsize: int) -> int:
    """As ``tile.count_segments`` does."""
    lanes, vectors, segment = config[:3]
    n_words = 0 if vocab_size <= lanes else vocab_size * itemsize // WORD_BYTES - 1
    return max(triton.cdiv(n_words, lanes * vectors * segment), 1)


def read_rows(
    call: Plan, logits: Tensor, aligned: bool, rows: Rows | Tensor, temperatures: Tensor | None
) -> tuple[int, Tensor]:
    """The ``SOURCE`` of the kernel that follows, and the tensor in which it finds the rows' sums.

    Split rows are read here, into a buffer of ``20 lanes`` bytes per segment.

    Args:
        rows: their targets alone, where no row has a weight.
    """
    n = logits.shape[0]
    n_parts = call.count_parts(n)
    if n_parts == 1:
        return LOGITS.value, logits
    floats = (n_parts * N_SUMS.value + 1) * call.config.lanes
    parts = logits.new_empty((n, floats), dtype=torch.float32)
    has_weights = isinstance(rows, Rows)
    call.run(
        segments_kernel,
        Flags(aligned, has_temperatures=temperatures is not None),
        None,
        n,
        n_parts,
        logits,
        parts,
        rows if has_weights else Rows(rows, parts, parts, parts),
        float(has_weights),
        logits if temperatures is None else temperatures,
        call.numbers,
        logits.stride(0),
        call.row.vocab_size,
    )
    return PARTS.value, parts


# ---- tensors --------------------------------------------------------------------------------


def is_aligned(rows: Tensor) -> bool:
    """Whether every row starts on a 16-byte boundary."""
    return (rows.data_ptr() | rows.stride(0) * rows.element_size()) % WORD_BYTES == 0


def same_words(logits: Tensor, dlogits: Tensor) -> bool:
    """Whether the elements of a 16-byte word of logits lie in one aligned word of dlogits."""
    word = WORD_BYTES // logits.element_size()
    offset = (
        logits.data_ptr() // logits.element_size() - dlogits.data_ptr() // dlogits.element_size()
    )
    return offset % word == 0 and (logits.stride(0) - dlogits.stride(0)) % word == 0


def row_tensor(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values [N]` contiguous, in `dtype`, on a 16-byte boundary: Triton specializes on that."""
    if values.dtype is not dtype:
        values = values.to(dtype)
    if not values.is_contiguous():
        values = values.contiguous()
    return values if values.data_ptr() % WORD_BYTES == 0 else values.clone()


def temperatures(row: RowParams) -> Tensor | None:
    """Each row's, where rows do not share one."""
    return None if row.temperatures is None else row_tensor(row.temperatures, torch.float32)


# ---- launches -------------------------------------------------------------------------------


# The modules with device functions, each behind those from which it takes some.
_MODULES = (
    *("row_state", "row_grad", "policy_loss", "tile", "source", "gradient"),
    *("token_stats", "fused_loss"),
)


@cache
def hash_all() -> None:
    """Hashes all device functions in one order, in every process.

    What Triton keeps on disk goes by a kernel's hash, which up to 3.6 depends on which of the
    functions that it calls another kernel has had hashed before. A process that called kernels in
    another order would compile them again.
    """
    for name in _MODULES:
        for function in vars(importlib.import_module(f"{__package__}.{name}")).values():
            if isinstance(function, JITFunction):
                _ = function.cache_key


@cache
def _warp_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def options(
    kernel: Any, how: Variant, maxnreg: int, warp_size: int, nvidia: bool
) -> dict[str, Any]:
    """Launch options. Contraction of a * b + c is off: two kernels might differ in it."""
    lanes = how.LANES.value
    chosen = {"num_warps": lanes // warp_size, "num_stages": 1, "enable_fp_fusion": False}
    more = not how.ALIGNED.value or kernel.__name__ == "policy_loss_kernel"
    if nvidia and more and how.SOURCE.value == LOGITS.value:
        # ptxas would spill a few bytes to reach the next step of occupancy.
        most = config.REGISTERS // lanes
        chosen["maxnreg"] = min(CAPPED_REGISTERS, most) if how.HAS_SOFTCAP.value else maxnreg
    return chosen


def first_launch(kernel: Any, call: Plan, grid: tuple[int, int, int], *args: Any) -> Any:
    """Starts a kernel by Triton's own launch. The last argument is the variant.

    Returns:
        The compiled kernel.
    """
    nvidia = torch.version.hip is None
    chosen = options(kernel, args[-1], call.config.maxnreg, _warp_size(call.device), nvidia)
    return kernel[grid](*args, **chosen)
