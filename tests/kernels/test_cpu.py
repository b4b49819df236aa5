"""The native CPU backend: every instruction set, threads, splitting of rows, fork, alignment."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from papo_kernels import Compute, Objective, PolarityWeighting, token_stats
from papo_kernels.backends import extension
from papo_kernels.backends.native import CPU
from papo_kernels.types import RowParams
from tests.cases import make_case, make_loss_case

PARAMS = Objective(clip_high=0.28, dual_clip=2.0, kl_coef=0.04, entropy_coef=0.01)
CHUNK = 16384  # csrc/cpu/row_kernels.h

# The kernel suite's core, run in a process that was told to use one instruction set.
ISA_CHECK = """
import torch
from papo_kernels import Compute, Objective, PolarityWeighting, token_stats
from papo_kernels.backends import extension
from papo_kernels.backends.native import CPU
from tests.cases import LOGITS, make_case, make_loss_case
from tests.oracle import check_policy_loss, check_token_stats

assert extension.cpu_isa() == {isa!r}, extension.cpu_isa()
objective = Objective(0.2, 0.28, 2.0, 0.04, 0.01)
weighting = PolarityWeighting(0.5, 0.7, "tanh", sigma=0.1)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for kind in LOGITS:
        for row in ({{}}, {{"temperature": 0.7}}, {{"softcap": 20.0}}):
            check_token_stats(make_case(kind, 6, 133, dtype=dtype, **row), "cpu")
            case = make_loss_case(
                kind, 6, 133, dtype=dtype, objective=objective, weighting=weighting, **row
            )
            check_policy_loss(case, "cpu", inplace=kind == "normal", factor=1.5)
    # Tails of every length around one and two vectors; V beyond a block and a chunk.
    for v in (*range(1, 70), 1024, 1025, 1057, 16384, 16385, 33000):
        check_token_stats(make_case("normal", 3, v, dtype=dtype), "cpu")
        check_policy_loss(make_loss_case("normal", 3, v, dtype=dtype), "cpu")
    bad = torch.zeros(5, 3000, dtype=dtype)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        bad[i + 1, 2999 - i] = value
    bad[4] = -torch.inf
    targets = torch.zeros(5, dtype=torch.int64)
    entropy = token_stats(bad, targets, compute=Compute("cpu")).entropy
    assert entropy.isnan().tolist() == [False, True, True, False, True], entropy
# Loading, multiplying and rounding every half-precision number there is, to nearest even.
for dtype in (torch.bfloat16, torch.float16):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    for factor in (1.5, 0.3, -3.0, 1e-4):
        expected = (every.float() * factor).to(dtype)
        flushed = (every.float().abs() < 1.2e-38) | ((every.float() * factor).abs() < 1.2e-38)
        scaled = every.clone()
        CPU.scale_(scaled, torch.tensor(factor))
        same = (scaled == expected) | (scaled.isnan() & expected.isnan())
        assert (same | (flushed & (scaled == 0))).all(), (dtype, factor)
# The gradient is rounded to bfloat16 almost as if it had been exact: within 0.53 of a unit in the
# last place, 0.5 being the format's own, down to the smallest normal numbers.
z = torch.linspace(-74.0, 3.0, 1 << 14).to(torch.bfloat16).view(1, -1).requires_grad_()
token_stats(z, torch.tensor([9]), compute=Compute("cpu")).logp.sum().backward()
exact = -torch.softmax(z.detach().double(), 1)
exact[0, 9] += 1.0
units = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 8)
error = ((z.grad.double() - exact) / units).abs().max()
assert error < 0.53, error
print("passed")
"""


@pytest.mark.parametrize("isa", extension.CPU_ISAS)
def test_every_instruction_set(isa):
    """A set that this machine lacks is refused by name; more cannot be tested of it."""
    environment = {**os.environ, "PAPO_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ISA_CHECK.format(isa=isa)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if isa != "portable" and f"PAPO_CPU_ISA={isa!r}: this machine offers" in done.stderr:
        return
    assert done.stdout.strip() == "passed", done.stderr


def everything(case, inplace):
    """All outputs and gradients of both functions."""
    logits = case.logits.detach().requires_grad_()
    stats = case.token_stats(logits, "cpu")
    (dstats,) = torch.autograd.grad(sum(x.sum() for x in stats[:3]), logits)
    out = case.policy_loss(logits.mul(1.0), "cpu", inplace=inplace)
    (dloss,) = torch.autograd.grad(1.5 * out.loss, logits)
    return (*stats, *out, dstats, dloss)


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# (N, V): rows for every thread; fewer rows than threads, so that the threads share a row's chunks;
# one row; a last chunk of one column; too small for threads.
SHAPES = [(64, 9000), (2, 100_000), (1, 151_937), (3, 5 * CHUNK + 1), (4, 100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "v"), SHAPES)
def test_results_do_not_depend_on_the_number_of_threads(n, v, dtype, with_threads):
    """Bit for bit, whoever scans which part."""
    case = make_loss_case(
        "normal",
        n,
        v,
        dtype=dtype,
        objective=PARAMS,
        weighting=PolarityWeighting(0.5, 0.5),
        vocab_size=v - 1 if v > 100 else None,
    )
    with_threads(1)
    alone = everything(case, inplace=False)
    for threads in (2, 3, 8):
        with_threads(threads)
        for inplace in (False, True):
            together = everything(case, inplace)
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_bad_and_ignored_rows_where_rows_are_split(with_threads):
    """Two rows on eight threads: NaN in one part of a row reaches all of it and nothing else."""
    case = make_loss_case("normal", 2, 100_000, objective=PARAMS)
    with_threads(8)
    clean = everything(case, False)
    case.logits[1, 70_000] = torch.nan
    hurt = everything(case, True)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(clean, hurt, strict=True) if a.dim())
    assert all(x[1].isnan().all() for x in hurt if x.dim() and x.is_floating_point())
    case.targets[1] = -100
    ignored = everything(case, True)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(clean, ignored, strict=True) if a.dim())
    assert all(x[1].eq(0).all() for x in ignored if x.dim())


def test_run_to_run_determinism(with_threads):
    with_threads(4)
    case = make_loss_case("normal", 3, 120_000, objective=PARAMS)
    first = everything(case, False)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(case, False), strict=True))


def _in_child(queue, logits, targets):
    torch.set_num_threads(2)
    queue.put(token_stats(logits, targets, compute=Compute("cpu")).logp.tolist())


def test_a_forked_process_can_call_the_kernels(with_threads):
    """A pool's threads would be missing in the child, and the call would hang."""
    case = make_case("normal", 2, 200_000)
    with_threads(2)
    expected = case.token_stats(case.logits, "cpu").logp.tolist()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue, case.logits, case.targets))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_outside_the_rows_is_written(dtype):
    """Gradient in place over a slice of a larger buffer, at every alignment within a cache line."""
    n, v = 3, 77
    case = make_loss_case("normal", n, v, dtype=dtype, objective=PARAMS)
    row = RowParams(1.0, 0.0, v - 2)
    grads = (torch.ones(n, dtype=torch.float64 if dtype == torch.float64 else torch.float32),) * 4
    targets = torch.arange(n)
    *_, state = CPU.token_stats_fwd(case.logits, targets, row)
    expected = CPU.token_stats_bwd(case.logits, targets, state, grads, row)
    for offset in range(0, 64 // case.logits.element_size() + 1):
        buffer = torch.full((offset + n * (v + 5) + 64,), 3.0, dtype=dtype)
        rows = buffer[offset:][: n * (v + 5)].view(n, v + 5)[:, :v]
        rows.copy_(case.logits)
        CPU.token_stats_bwd(rows, targets, state, grads, row, rows)
        assert torch.equal(rows, expected)
        rows.fill_(3.0)
        assert buffer.eq(3.0).all()


def test_subnormal_mode_of_the_caller_is_restored():
    """The kernels flush subnormals to zero; the caller's arithmetic must not."""
    tiny = torch.tensor([1e-39])
    assert (tiny * 0.5).item() != 0.0
    case = make_case("normal", 4, 70_000)
    case.token_stats(case.logits, "cpu")
    assert (tiny * 0.5).item() != 0.0
