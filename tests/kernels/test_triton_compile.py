"""Every Triton kernel compiles exactly as its launcher asks for it, and none spills. Needs no GPU.
`python -m benchmarks.machine_code` checks the rest of the machine code."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.machine_code.triton_kernels import CALLS, compiled, kernels_of, loop_of, usage
from papo_kernels import Objective
from papo_kernels.types import RowParams, TokenInputs

pytestmark = pytest.mark.needs("no interpreter")

# Every variant for sm_90, and every kernel for the other architectures.
NVIDIA = [(name, 90) for name in CALLS]
NVIDIA += [(n, a) for n in ("stats_split", "backward", "loss", "scale") for a in (80, 100)]


@pytest.mark.parametrize(("name", "arch"), NVIDIA)
def test_no_spills_and_no_stack(name, arch):
    for kernel_name, kernel in compiled(arch, CALLS[name]):
        _, stack = usage(kernel)
        assert stack == 0, kernel_name


@pytest.mark.parametrize("name", ["stats_odd", "backward", "loss_split", "scale"])
def test_amd(name):
    """Down to the machine code of an MI300, without vector spills."""
    for kernel_name, kernel in compiled("gfx942", CALLS[name]):
        asm = kernel.asm["amdgcn"]
        (spills,) = set(re.findall(r"\.vgpr_spill_count:\s*(\d+)", asm))
        assert spills == "0", kernel_name


def test_both_entry_points_scan_with_the_same_instructions():
    """From which the same bits follow: contraction is off, and no reduction is in the loop."""
    scans = []
    for name in ("stats", "loss", "stats_split"):
        body = loop_of(kernels_of(name, 90)[0], "MUFU.EX2")
        scans.append(
            sorted(x.opcode for x in body if re.match(r"(FADD|FMUL|FFMA|FMNMX|MUFU)", x.opcode))
        )
    assert scans[0] == scans[1] == scans[2]


def test_nothing_but_the_variant_leads_to_a_compilation():
    """Rows, columns, temperature, alignment of row tensors, coefficients, limits: a kernel each,
    once."""
    from papo_kernels.backends.triton import TRITON

    def calls():
        for n, v, t, clip in (
            (100, 8000, 1.0, 0.1),
            (117, 30_000, 0.7, 0.2),
            (512, 8192, 16.0, 1.0),
        ):
            g = torch.zeros(n + 1)
            for values in (g[:-1], g[1:]):
                logits, targets = (
                    torch.empty(n, v, dtype=torch.bfloat16),
                    torch.zeros(n + 1, dtype=torch.int64)[1:],
                )
                row = RowParams(t, 0.0, v - 1)
                *_, state = TRITON.token_stats_fwd(logits, targets, row)
                TRITON.token_stats_bwd(logits, targets, state, (values, None, values, None), row)
                for old, kl, limit in ((values, 0.0, None), (None, 0.5, 1.0 + t)):
                    tokens = TokenInputs(values, values, old, values, None, old)
                    limits = {"log_ratio_limit": limit, "kl_limit": limit}
                    objective = Objective(clip, clip, limit, kl, clip, **limits)
                    TRITON.policy_loss_fwd(logits, targets, tokens, objective, None, row, logits)
            TRITON.scale_(logits, torch.ones(()))

    kernels = compiled(90, calls)
    variants = {(name, kernel.hash) for name, kernel in kernels}
    assert len(kernels) == 27
    assert len(variants) == len({name for name, _ in kernels}) == 4
