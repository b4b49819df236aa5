"""The values of targets, which are checked where that does not make the host wait."""

from __future__ import annotations

from torch import Tensor

from papo_kernels.types import IGNORE_INDEX

from . import extension


def check_target_values(targets: Tensor, vocab_size: int) -> None:
    """On a CPU a bad target raises before anything runs; GPU kernels guard their reads instead.

    Args:
        targets: ``[N]`` or ``[N, k]`` int64, contiguous.

    Raises:
        ValueError: naming the value and where it stands.
    """
    if not targets.is_cpu:
        return
    native = extension.loaded()
    if native is not None:
        at = native.first_bad_target(targets.data_ptr(), targets.numel(), vocab_size)
    else:
        targets = targets.view(-1)
        bad = ((targets < 0) | (targets >= vocab_size)) & (targets != IGNORE_INDEX)
        at = int(bad.nonzero()[0]) if bad.any() else -1
    if at >= 0:
        raise ValueError(
            f"targets: expected values in [0, {vocab_size}) or {IGNORE_INDEX} (ignored), got "
            f"{int(targets.view(-1)[at])} at flat position {at}"
        )
