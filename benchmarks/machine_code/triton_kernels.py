"""Every Triton kernel compiled, without a GPU, exactly as its launcher asks for it.

A stand-in for Triton's driver names the target. The launchers run on CPU tensors, and what they
would launch is compiled.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.issue_model.build import run_tool
from papo_kernels import Objective
from papo_kernels.types import RowParams, TokenInputs

from .rules import broken

ARCHITECTURES = (80, 90, 100)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LONG, ODD = 151_936, 151_937
# Registers that leave three (80), or for a soft cap two (128), programs of 256 threads on an SM.
BUDGET, CAPPED_BUDGET = 80, 128
FLOAT64 = re.compile(r"D(FMA|ADD|MUL|SETP|MNMX)|F2F\.|MUFU\.\w+64H")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")


class Instruction(NamedTuple):
    """One line of a kernel's machine code."""

    address: int
    opcode: str
    operands: str


class Kernel(NamedTuple):
    """One compiled launch."""

    name: str
    registers: int
    stack: int  # bytes
    sass: tuple[Instruction, ...]


def target(architecture: int | str) -> Any:
    from triton.backends.compiler import GPUTarget

    if isinstance(architecture, str):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", architecture, 32)


class Driver:
    """What Triton asks its driver for when it compiles."""

    def __init__(self, architecture):
        self.target = target(architecture)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # kernels are cached by device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compiled(architecture: int | str, call: Callable[[], None]) -> list[tuple[str, Any]]:
    """The kernels that `call` would launch, as (name, kernel).

    architecture: 80, 90, ... of NVIDIA, or a name of AMD's.
    """
    from triton.runtime import driver

    from papo_kernels.backends.triton import launch

    kernels = []

    def compile_only(kernel, plan, grid, *args):
        at, how = target(architecture), args[-1]
        nvidia = at.backend == "cuda"
        options = launch.options(kernel, how, plan.config.maxnreg, at.warp_size, nvidia)
        kernels.append((kernel.__name__, kernel.warmup(*args, grid=(1,), **options)))

    with (
        mock.patch.object(launch, "first_launch", compile_only),
        mock.patch.object(driver, "_active", Driver(architecture)),
    ):
        call()
    return kernels


# ---- calls ----------------------------------------------------------------------------------


def logits_of(v, dtype, n):
    """Never touched, so never in memory."""
    return torch.empty(n, v, dtype=dtype)


def stats(v, dtype, n=100, softcap=0.0):
    from papo_kernels.backends.triton import TRITON

    targets = torch.zeros(n, dtype=torch.int64)
    TRITON.token_stats_fwd(logits_of(v, dtype, n), targets, RowParams(0.9, softcap, v))


def backward(v, dtype, n=100, squares=True):
    from papo_kernels.backends.triton import TRITON

    g, targets = torch.zeros(n), torch.zeros(n, dtype=torch.int64)
    state = torch.zeros(n, 6, dtype=torch.float64)
    grads = (g, g, g if squares else None, None)
    logits = logits_of(v, dtype, n)
    TRITON.token_stats_bwd(logits, targets, state, grads, RowParams(0.9, 0.0, v), logits)


def loss(
    v,
    dtype,
    n=100,
    *,
    softcap=0.0,
    narrow=None,
    gradient=True,
    state=False,
    temperatures=False,
    **objective,
):
    from papo_kernels.backends.triton import TRITON

    g, logits = torch.zeros(n), logits_of(v, dtype, n)
    TRITON.policy_loss_fwd(
        logits,
        torch.zeros(n, dtype=torch.int64),
        TokenInputs(g, g, g, g),
        Objective(**objective),
        None,
        RowParams(0.9, softcap, v, temperatures=g if temperatures else None),
        (logits if narrow is None else logits_of(v, narrow, n)) if gradient else None,
        torch.zeros(n, 6, dtype=torch.float64) if state else None,
    )


def scale(dtype):
    from papo_kernels.backends.triton import TRITON

    TRITON.scale_(logits_of(LONG, dtype, 8), torch.ones(()))


# n=2 rows are few: their segments are read by one kernel and finished by another.
CALLS = {
    "stats": lambda: stats(LONG, BF16),
    "stats_f16": lambda: stats(LONG, F16),
    "stats_f32": lambda: stats(128_256, F32),
    "stats_odd": lambda: stats(ODD, BF16),
    "stats_short": lambda: stats(4000, BF16),
    "stats_tiny": lambda: stats(1000, BF16),
    "stats_split": lambda: stats(LONG, BF16, n=2),
    "backward": lambda: backward(LONG, BF16),
    "backward_without_squares": lambda: backward(ODD, BF16, squares=False),
    "loss": lambda: loss(LONG, BF16),
    "loss_short": lambda: loss(32_000, BF16),
    "loss_f32": lambda: loss(LONG, F32),
    "loss_odd": lambda: loss(ODD, BF16),
    "loss_split": lambda: loss(LONG, BF16, n=2),
    "loss_without_gradient": lambda: loss(LONG, BF16, gradient=False),
    "loss_narrow_from_state": lambda: loss(LONG, F32, narrow=BF16, state=True),
    "loss_softcap": lambda: loss(LONG, BF16, softcap=30.0),
    "loss_temperatures": lambda: loss(LONG, BF16, temperatures=True, kl_estimator="k1"),
    "loss_cispo": lambda: loss(LONG, BF16, surrogate="cispo", kl_ratio=True),
    "loss_sapo": lambda: loss(LONG, BF16, surrogate="sapo", kl_estimator="k2"),
    "loss_dppo_kl": lambda: loss(LONG, BF16, surrogate="dppo_kl", kl_estimator="abs+"),
    "loss_ce_gppo": lambda: loss(LONG, BF16, surrogate="ce_gppo", kl_estimator="k3+"),
    "scale": lambda: scale(BF16),
}


@contextlib.contextmanager
def _cubin(kernel: Any) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        yield str(path)


def usage(kernel: Any) -> tuple[int, int]:
    """Registers and bytes of stack of a kernel compiled for NVIDIA."""
    with _cubin(kernel) as path:
        text = run_tool("cuobjdump", "--dump-resource-usage", path)
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert match
    return int(match[1]), int(match[2])


def sass_of(kernel: Any) -> tuple[Instruction, ...]:
    """The machine code of a kernel compiled for NVIDIA."""
    with _cubin(kernel) as path:
        found = INSTRUCTION.findall(run_tool("cuobjdump", "-sass", path))
    return tuple(Instruction(int(at, 16), name, operands) for at, name, operands in found)


@cache
def kernels_of(name: str, architecture: int) -> tuple[Kernel, ...]:
    """The kernels of a call, with what the machine code tells."""
    return tuple(
        Kernel(kernel_name, *usage(kernel), sass_of(kernel))
        for kernel_name, kernel in compiled(architecture, CALLS[name])
    )


def loop_of(kernel: Kernel, opcode: str) -> list[Instruction]:
    """The innermost loop that has most of `opcode`."""
    loops = []
    for i, (address, name, operands) in enumerate(kernel.sass):
        to = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if to and int(to[1], 16) < address:
            loops.append([x for x in kernel.sass[: i + 1] if x.address >= int(to[1], 16)])
    inner = [a for a in loops if not any(b is not a and set(b) < set(a) for b in loops)]
    return max(inner, key=lambda body: sum(x.opcode.startswith(opcode) for x in body))


# ---- counts and rules ---------------------------------------------------------------------------

# How many elements a thread has in a tile, of calls whose scan and whose gradient is counted.
SCANNED = {"stats": 32, "stats_f16": 32, "stats_f32": 16, "stats_odd": 32}
WRITTEN = {"loss": 32, "loss_f32": 16, "loss_softcap": 32, "backward": 32}
# Calls, and how many float64 instructions the state that they store may take: every warp of a
# program does these, on a consumer GPU at a 64th of the speed of float32.
MOST_FLOAT64 = {"stats": 4, "stats_short": 4, "loss": 0, "loss_softcap": 0, "loss_split": 0}
GRADIENTS = ("backward", "loss", "loss_f32", "loss_odd", "loss_split")


def counts(name: str, architecture: int) -> dict[str, float]:
    """Registers of a call's kernels and, on sm_90, instructions per element of its inner loops."""
    kernels = kernels_of(name, architecture)
    found: dict[str, float] = {"registers": max(k.registers for k in kernels)}
    if architecture == 90 and name in SCANNED:
        found["scan"] = len(loop_of(kernels[0], "MUFU.EX2")) / SCANNED[name]
    if architecture == 90 and name in WRITTEN:
        found["gradient"] = len(loop_of(kernels[-1], "STG")) / WRITTEN[name]
    return found


def _scan_rules(kernel: Kernel) -> dict[str, bool]:
    opcodes = [x.opcode for x in loop_of(kernel, "MUFU.EX2")]
    loads = [op for op in opcodes if op.startswith("LD")]
    return {
        "the scan does not read by words": bool(loads)
        and all(op.startswith("LDG.E") and op.endswith(".128") for op in loads),
        "the scan crosses threads": not any(
            re.match(r"(SHFL|BAR|LDS|STS|RED|ATOM)", op) for op in opcodes
        ),
    }


def _gradient_rules(kernel: Kernel) -> dict[str, bool]:
    accesses = [x.opcode for x in loop_of(kernel, "STG") if re.match(r"(LD|ST)", x.opcode)]
    return {
        "the gradient is not written four words at a time": sum(
            op.startswith("STG") for op in accesses
        )
        == 4,
        "the gradient is not written by words": all(op.endswith(".128") for op in accesses),
    }


def broken_rules(name: str, architecture: int) -> list[str]:
    """What the machine code of a call's kernels must not be, and is."""
    budget = CAPPED_BUDGET if "softcap" in name else BUDGET
    found = []
    for i, kernel in enumerate(kernels_of(name, architecture)):
        opcodes = [x.opcode for x in kernel.sass]
        rules = {
            "it uses the stack": kernel.stack == 0,
            "it uses local memory": not any(re.match(r"(LDL|STL)", op) for op in opcodes),
            f"it has more than {budget} registers": kernel.registers <= budget,
        }
        if architecture == 90 and name in MOST_FLOAT64:
            float64 = sum(bool(FLOAT64.match(op)) for op in opcodes)
            rules[f"it has {float64} float64 instructions"] = float64 <= MOST_FLOAT64[name]
        if architecture == 90 and i == 0 and name.startswith("stats") and "tiny" not in name:
            rules |= _scan_rules(kernel)
        if architecture == 90 and i == len(kernels_of(name, 90)) - 1 and name in GRADIENTS:
            rules |= _gradient_rules(kernel)
        found += broken(f"triton {name}: {kernel.name} sm_{architecture}", rules)
    return found


def broken_amd_rules(name: str) -> list[str]:
    """The same of an MI300's machine code."""
    found = []
    for kernel_name, kernel in compiled("gfx942", CALLS[name]):
        asm = kernel.asm["amdgcn"]
        rules = {
            "it spills": set(re.findall(r"\.vgpr_spill_count:\s*(\d+)", asm)) == {"0"},
            "it does not read by words": kernel_name == "scale_kernel" or "load_dwordx4" in asm,
        }
        found += broken(f"triton {name}: {kernel_name} gfx942", rules)
    return found
