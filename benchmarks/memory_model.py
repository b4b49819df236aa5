"""The memory table of docs/linear.md, computed: ``python -m benchmarks.memory_model``.

Bytes beyond hidden states, weight and their gradients, for one policy loss with all gradients:

- logits whole, eager: logits in the operands' dtype, their float32 copy, its log-softmax (saved for
  backward) and the float32 gradient of both: N V (2 + 4 + 4 + 4) bytes for bfloat16;
- ``policy_loss(inplace=True)`` on whole logits: the logits, which become their gradient: 2 N V;
- ``linear_policy_loss``: its workspace (by default 1/32 of an 80 GiB GPU, or 256 MiB) and, where
  the tokens need more than one slab, the lower two bytes of the float32 sum that becomes a half
  weight's gradient: 2 V D.

A test holds the last against the allocations of real calls.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

from papo_kernels.head.plan import make_plan


class Model(NamedTuple):
    name: str
    vocab: int  # rows of the embedding, padding included
    hidden: int


# From the models' published configs.
MODELS = (
    Model("SmolLM2 135M", 49152, 576),
    Model("Qwen3 0.6B", 151936, 1024),
    Model("Qwen3 1.7B", 151936, 2048),
    Model("Qwen3 4B", 151936, 2560),
    Model("Qwen3 8B", 151936, 4096),
    Model("Qwen3 14B, 32B", 151936, 5120),
    Model("Llama 3.2 1B", 128256, 2048),
    Model("Llama 3.2 3B", 128256, 3072),
    Model("Llama 3.1 8B", 128256, 4096),
    Model("Llama 3.1 70B", 128256, 8192),
    Model("Gemma 3 270M", 262144, 640),
    Model("Gemma 3 1B", 262144, 1152),
    Model("Gemma 3 4B", 262208, 2560),
    Model("Gemma 3 12B", 262208, 3840),
    Model("Gemma 3 27B", 262208, 5376),
)
CPU, GPU_80 = 256 * 2**20, 80 * 2**30 // 32  # default workspaces


def linear_bytes(
    rows: int, model: Model, dtype: torch.dtype, workspace: int, frozen: bool = False
) -> int:
    """Of `linear_policy_loss` (or the backward of `linear_token_stats`) beyond results; `frozen`:
    the weight needs no gradient."""
    dtypes = (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    weight_sum = 0 if frozen else model.vocab * model.hidden * (dtypes[1].itemsize - dtype.itemsize)
    plan = make_plan(rows, model.vocab, model.hidden, dtypes, True, workspace, weight_sum)
    held = plan.chunk_rows * plan.pitch * dtypes[1].itemsize
    if plan.narrow:
        held += plan.slab_rows * plan.pitch * dtype.itemsize
    if plan.narrow and plan.slabs > 1:
        held += weight_sum
    return held


def eager_bytes(rows: int, model: Model, dtype: torch.dtype) -> int:
    """Of log-softmax, gather and entropy on whole logits, at least."""
    copies = 3 if dtype.itemsize == 2 else 2
    return rows * model.vocab * (dtype.itemsize + 4 * copies)


def in_place_bytes(rows: int, model: Model, dtype: torch.dtype) -> int:
    return rows * model.vocab * dtype.itemsize


def table(rows: tuple[int, int], dtype: torch.dtype) -> str:
    """Markdown, in MiB."""
    columns = ["", "head V x D"]
    for n in rows:
        columns += [f"eager, {n}", f"in place, {n}", f"linear, {n}"]
    columns += ["linear, 256 MiB, any N", "frozen weight, any N"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for model in MODELS:
        sizes = []
        for n in rows:
            sizes += [eager_bytes(n, model, dtype), in_place_bytes(n, model, dtype)]
            sizes.append(linear_bytes(n, model, dtype, GPU_80))
        sizes += [CPU + model.vocab * model.hidden * (2 if dtype.itemsize == 2 else 0), CPU]
        cells = [f"{model.vocab} x {model.hidden}", *(f"{size / 2**20:,.0f}" for size in sizes)]
        lines.append(f"| {model.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs=2, default=(8192, 32768), metavar="N")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args()
    print(f"{args.dtype}, MiB beyond hidden states, weight and their gradients\n")
    print(table(tuple(args.rows), getattr(torch, args.dtype)))


if __name__ == "__main__":
    main()
