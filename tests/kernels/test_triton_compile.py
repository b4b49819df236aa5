"""Every Triton kernel compiled, without a GPU, exactly as its launcher asks for it.

A stand-in for Triton's driver names the target; the launchers run on CPU tensors, and what they
would launch is compiled. Then ptxas' figures and the machine code are looked at.
"""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from papo_kernels import PolicyLossParams
from papo_kernels.types import RowParams, TokenInputs

pytestmark = pytest.mark.needs("no interpreter")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LONG, ODD = 151_936, 151_937
# Registers that leave three (80), or for a soft cap two (128), programs of 256 threads on an SM.
BUDGET, CAPPED_BUDGET = 80, 128
FLOAT64 = re.compile(r"D(FMA|ADD|MUL|SETP|MNMX)|F2F\.|MUFU\.\w+64H")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")


class Kernel(NamedTuple):
    """One compiled launch."""

    name: str
    asm: dict
    registers: int
    stack: int
    sass: tuple  # (address, opcode, operands)


def target(arch):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


class Driver:
    """What Triton asks its driver for when it compiles."""

    def __init__(self, arch):
        self.target = target(arch)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # kernels are cached by device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compiled(arch, call):
    """The kernels that `call` would launch, as (name, kernel)."""
    from triton.runtime import driver

    from papo_kernels.backends.triton import launch

    kernels = []

    def compile_only(kernel, plan, grid, *args):
        at, how = target(arch), args[-1]
        nvidia = at.backend == "cuda"
        options = launch.options(kernel, how, plan.config.maxnreg, at.warp_size, nvidia)
        kernels.append((kernel.__name__, kernel.warmup(*args, grid=(1,), **options)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "first_launch", compile_only)
        patch.setattr(driver, "_active", Driver(arch))
        call()
    return kernels


def tool(name, *arguments):
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


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
    grads = (g, g, g if squares else None)
    logits = logits_of(v, dtype, n)
    TRITON.token_stats_bwd(logits, targets, state, grads, RowParams(0.9, 0.0, v), logits)


def loss(v, dtype, n=100, softcap=0.0, narrow=None, gradient=True, state=False):
    from papo_kernels.backends.triton import TRITON

    g, logits = torch.zeros(n), logits_of(v, dtype, n)
    TRITON.policy_loss_fwd(
        logits,
        torch.zeros(n, dtype=torch.int64),
        TokenInputs(g, g, g, g),
        PolicyLossParams(),
        None,
        RowParams(0.9, softcap, v),
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
    "scale": lambda: scale(BF16),
}


@cache
def kernels_of(name, arch):
    """The kernels of a call, with what the machine code tells."""
    results = []
    for kernel_name, kernel in compiled(arch, CALLS[name]):
        path = Path(os.environ.get("TMPDIR", "/tmp")) / f"papo-{os.getpid()}.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", str(path))
        sass = INSTRUCTION.findall(tool("cuobjdump", "-sass", str(path)))
        path.unlink()
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        results.append(Kernel(kernel_name, kernel.asm, int(registers), int(stack), tuple(sass)))
    return results


def loop_of(kernel, opcode):
    """The instructions of the innermost loop that has most of `opcode`: opcodes, operands."""
    loops = []
    for i, (address, name, operands) in enumerate(kernel.sass):
        to = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if to and int(to.group(1), 16) < int(address, 16):
            start = int(to.group(1), 16)
            loops.append([x for x in kernel.sass[: i + 1] if int(x[0], 16) >= start])
    inner = [a for a in loops if not any(b is not a and set(b) < set(a) for b in loops)]
    return max(inner, key=lambda body: sum(x[1].startswith(opcode) for x in body))


# ---- tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", CALLS)
def test_no_spills_no_stack_and_registers_within_budget(name, arch):
    budget = CAPPED_BUDGET if "softcap" in name else BUDGET
    for kernel in kernels_of(name, arch):
        assert kernel.stack == 0, kernel.name
        assert not [op for _, op, _ in kernel.sass if re.match(r"(LDL|STL)", op)], kernel.name
        assert kernel.registers <= budget, kernel.name


@pytest.mark.parametrize("name", [n for n in CALLS if n.startswith("stats") and "tiny" not in n])
def test_the_scan_reads_16_bytes_at_a_time_and_crosses_no_threads(name):
    """Also where rows are not aligned. Nothing but loads and arithmetic in the main loop."""
    kernel = kernels_of(name, 90)[0]
    opcodes = [op for _, op, _ in loop_of(kernel, "MUFU.EX2")]
    loads = [op for op in opcodes if op.startswith("LD")]
    assert loads
    assert all(op.startswith("LDG.E") and op.endswith(".128") for op in loads)
    assert not [op for op in opcodes if re.match(r"(SHFL|BAR|LDS|STS|RED|ATOM)", op)]


@pytest.mark.parametrize(
    ("name", "elements", "most"),
    [("stats", 32, 12.5), ("stats_f16", 32, 13), ("stats_f32", 16, 13), ("stats_odd", 32, 14.5)],
)
def test_instructions_an_element_of_the_scan(name, elements, most):
    """The byte model of docs/kernels.md rests on this; `elements` are a thread's in a tile."""
    body = loop_of(kernels_of(name, 90)[0], "MUFU.EX2")
    assert len(body) / elements <= most


@pytest.mark.parametrize(
    ("name", "most"),
    [("stats", 4), ("stats_short", 4), ("loss", 0), ("loss_softcap", 0), ("loss_split", 0)],
)
def test_float64_is_left_to_the_state_that_is_stored(name, most):
    """Every warp of a program does it, at a 64th of the speed of float32 on a consumer GPU."""
    for kernel in kernels_of(name, 90):
        assert sum(bool(FLOAT64.match(op)) for _, op, _ in kernel.sass) <= most, kernel.name


@pytest.mark.parametrize("name", ["backward", "loss", "loss_f32", "loss_odd", "loss_split"])
def test_the_gradient_is_written_16_bytes_at_a_time(name):
    opcodes = [op for _, op, _ in loop_of(kernels_of(name, 90)[-1], "STG")]
    accesses = [op for op in opcodes if re.match(r"(LD|ST)", op)]
    assert sum(op.startswith("STG") for op in accesses) == 4
    assert all(op.endswith(".128") for op in accesses)


def test_both_entry_points_scan_with_the_same_instructions():
    """From which the same bits follow: contraction is off, and no reduction is in the loop."""
    scans = []
    for name in ("stats", "loss", "stats_split"):
        body = loop_of(kernels_of(name, 90)[0], "MUFU.EX2")
        scans.append(
            sorted(op for _, op, _ in body if re.match(r"(FADD|FMUL|FFMA|FMNMX|MUFU)", op))
        )
    assert scans[0] == scans[1] == scans[2]


def test_nothing_but_the_variant_leads_to_a_compilation():
    """Rows, columns, temperature, alignment of row tensors, coefficients: a kernel each, once."""
    from papo_kernels.backends.triton import TRITON

    def calls():
        for n, v, t, clip in (
            (100, 8000, 1.0, 0.1),
            (117, 30_000, 0.7, 0.2),
            (512, 8192, 16.0, 1.0),
        ):
            g = torch.zeros(n + 1)
            for values in (g[:-1], g[1:]):
                logits, targets = logits_of(v, BF16, n), torch.zeros(n + 1, dtype=torch.int64)[1:]
                row = RowParams(t, 0.0, v - 1)
                *_, state = TRITON.token_stats_fwd(logits, targets, row)
                TRITON.token_stats_bwd(logits, targets, state, (values, None, values), row)
                for old, kl in ((values, 0.0), (None, 0.5)):
                    tokens = TokenInputs(values, values, old, values)
                    params = PolicyLossParams(clip, clip, None, kl, clip)
                    TRITON.policy_loss_fwd(logits, targets, tokens, params, None, row, logits)
            TRITON.scale_(logits, torch.ones(()))

    kernels = compiled(90, calls)
    variants = {(name, kernel.hash) for name, kernel in kernels}
    assert len(kernels) == 27
    assert len(variants) == len({name for name, _ in kernels}) == 4


@pytest.mark.parametrize("name", ["stats", "stats_odd", "backward", "loss", "loss_split", "scale"])
def test_amd(name):
    """Down to the machine code of an MI300, with 16-byte accesses and no vector spills."""
    for kernel_name, kernel in compiled("gfx942", CALLS[name]):
        asm = kernel.asm["amdgcn"]
        (spills,) = set(re.findall(r"\.vgpr_spill_count:\s*(\d+)", asm))
        assert spills == "0", kernel_name
        if kernel_name != "scale_kernel":
            assert "load_dwordx4" in asm, kernel_name
