"""What the public functions accept: each check raises, naming the argument, its value and what was
expected, before anything is launched."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

HALF_DTYPES = (torch.bfloat16, torch.float16)
GPU_DTYPES = (torch.float32, *HALF_DTYPES)  # of the logits that GPU kernels take
FLOAT_DTYPES = (torch.float64, *GPU_DTYPES)
_STRIDED = torch.strided


def check_type(name: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{name}: expected {expected.__name__}, got {type(value).__name__}")


def check_tensor(name: str, value: object) -> None:
    """A tensor whose elements lie in one piece of this process's memory."""
    if type(value) is Tensor and value.layout is _STRIDED and not value.is_nested:
        return
    check_type(name, value, Tensor)
    assert isinstance(value, Tensor)
    if value.is_nested:
        kind, instead = "a nested tensor", "its .values(), with those of the other inputs"
    elif hasattr(value, "full_tensor"):
        kind = f"a {type(value).__name__}"
        instead = "its full_tensor(), or for a Head(group=...) its to_local()"
    elif value.layout is not _STRIDED:
        name_of_layout = str(value.layout).removeprefix("torch.").removeprefix("_")
        kind, instead = f"one of layout {name_of_layout}", "its to_dense()"
    else:
        return
    raise TypeError(f"{name}: expected an ordinary tensor, got {kind}; pass {instead}")


def check_float(name: str, value: Tensor) -> None:
    """A floating-point tensor `[..., C]` with C >= 1."""
    check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}"
        )
    if value.dim() == 0 or value.shape[-1] == 0:
        letter = "V" if name == "logits" else "D"
        raise ValueError(
            f"{name}: expected shape [..., {letter}] with {letter} >= 1, got {tuple(value.shape)}"
        )


def check_device(name: str, value: Tensor, device: torch.device, like: str = "logits") -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like {like}, got {value.device}")


# Bounds are functions: as globals they would be variables of a traced graph, which Dynamo would
# start again without.
def factors() -> tuple[float, float]:
    """The least and the largest factor on logits. Kernels form the quotient of two, which float32
    has to hold as a normal number."""
    return 1e-18, 1e18


def _largest() -> float:
    """Of float32, in which kernels hold numbers: what is larger would be infinite there."""
    return 3.4028234663852886e38


def check_factor(name: str, value: object, otherwise: str = "") -> None:
    """A temperature, a soft cap or a scale of logits; `otherwise` says what else is allowed."""
    low, high = factors()
    if type(value) is float and low <= value <= high:
        return
    if not low <= check_number(name, value, otherwise) <= high:
        raise ValueError(
            f"{name}: expected {otherwise}a number in [{low:g}, {high:g}], got {value!r}"
        )


def check_number(name: str, value: object, otherwise: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        got = f"{type(value).__name__} {value!r}"
        raise TypeError(f"{name}: expected {otherwise}a number, got {got}")
    return float(value)


# Compared, not math.isfinite: what torch.compile keeps symbolic stays so.
def check_finite(name: str, value: object) -> None:
    if not -_largest() <= check_number(name, value) <= _largest():
        raise ValueError(f"{name}: expected a finite number that float32 holds, got {value!r}")


def check_at_least(name: str, value: object, low: float) -> None:
    if not low <= check_number(name, value) <= _largest():
        raise ValueError(f"{name}: expected a finite number >= {low:g}, got {value!r}")


def check_above(name: str, value: object, low: float) -> None:
    if not low < check_number(name, value) <= _largest():
        raise ValueError(f"{name}: expected a finite number > {low:g}, got {value!r}")


def check_bound(name: str, value: object, most: float = math.inf) -> None:
    """A distance from 1, which `most` limits, or inf for no bound."""
    number = check_number(name, value)
    if not (0.0 <= number <= most or number == math.inf):
        limits = ">= 0" if most == math.inf else f"in [0, {most:g}]"
        raise ValueError(f"{name}: expected a number {limits} or inf, got {value!r}")


def check_vocab_size(vocab_size: object) -> None:
    if vocab_size is None or isinstance(vocab_size, torch.SymInt):
        return
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size: expected an int or None, got {type(vocab_size).__name__}")


def counted_columns(columns: int, vocab_size: int | None, counted: str) -> int:
    """How many of the `columns` to read; `counted` says what they are.

    Raises:
        ValueError: a `vocab_size` out of range.
    """
    if vocab_size is None:
        return columns
    if not 1 <= vocab_size <= columns:
        raise ValueError(
            f"vocab_size: expected a value in [1, {columns}] ({counted}), got {vocab_size}"
        )
    return vocab_size


def check_targets(like: str, rows: Tensor, targets: Tensor) -> None:
    """`targets` against `rows [..., C]`, the tensor called `like`."""
    check_tensor("targets", targets)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")
    if targets.shape != rows.shape[:-1]:
        last = "the vocabulary" if like == "logits" else "its last dimension"
        raise ValueError(
            f"targets: expected shape {tuple(rows.shape[:-1])}, that of {like} "
            f"{tuple(rows.shape)} without {last}, got {tuple(targets.shape)}"
        )
    check_device("targets", targets, rows.device, like)


def check_token_input(name: str, value: Tensor | None, targets: Tensor, source: str) -> None:
    """All but the shape; `source` is what the loss is differentiable in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    check_tensor(name, value)
    if value.dtype.is_complex:
        raise TypeError(f"{name}: expected a real dtype, got {value.dtype}")
    check_device(name, value, targets.device, "targets")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor without gradient (the loss is differentiable in {source} "
            "only), got requires_grad=True; detach() it"
        )
