"""The model of the GPU kernels' issue: machine code read, run and timed. Needs no GPU."""

from __future__ import annotations

import subprocess
from typing import Any

import numpy as np
import pytest

from benchmarks.issue_model import build
from benchmarks.issue_model.listing import Instruction, parse
from benchmarks.issue_model.machine import BUILDERS, Cluster
from benchmarks.issue_model.memory_ops import GlobalMemory
from benchmarks.issue_model.model import by_phase
from benchmarks.issue_model.peers import CLUSTER_LATENCY, Sent
from benchmarks.issue_model.scheduler import (
    LATENCY,
    TAKEN_BRANCH,
    WAKE,
    Cost,
    Multiprocessor,
    cost_of,
)
from benchmarks.issue_model.warps import Step, Warp

LISTING = """
\t//## File "/somewhere/csrc/cuda/machine.cuh", line 50 inlined at "/x/resident.cu", line 48
\t//## File "/somewhere/csrc/cuda/resident.cu", line 48
        /*0000*/                   S2R R5, SR_TID.X ;       /* 0x0000000000057919 */
                                                            /* 0x000e220000002100 */
.L_x_1:
        /*0010*/              @!P0 LDS.128 R8, [R22+0x10] ; /* 0x0000000000057919 */
                                                            /* 0x001fe400078ec0ff */
\t//## File "/somewhere/csrc/cuda/tile.h", line 9
        /*0020*/               @P1 BRA `(.L_x_1) ;          /* 0x0000000400501947 */
                                                            /* 0x000fdc0003800000 */
"""


def test_a_listing_is_read():
    listing = parse(LISTING)
    first, second, third = listing.instructions
    assert (first.base, first.operands, first.guard) == ("S2R", ["R5", "SR_TID.X"], None)
    assert first.places == (("machine.cuh", 50), ("resident.cu", 48))
    assert (first.stall, first.write_barrier, first.wait) == (1, 0, 0)
    assert (second.base, second.modifiers, second.guard) == ("LDS", {"128"}, (True, "P", 0))
    assert second.places == first.places
    assert (second.stall, second.write_barrier, second.read_barrier, second.wait) == (2, 7, 7, 1)
    assert (third.stall, third.places) == (14, (("tile.h", 9),))
    assert listing.labels == {".L_x_1": 1}
    assert listing.at_address[0x20] == 2


# ---- instructions ---------------------------------------------------------------------------


def _run(*lines: str, **registers: Any) -> Warp:
    """Registers after some instructions; `registers`: R1=..., all lanes alike."""
    block: Any = None
    warp = Warp(block, 0, np.zeros(16, np.uint32))
    for name, value in registers.items():
        warp.r[int(name[1:])] = value
    for line in lines:
        opcode, _, operands = line.partition(" ")
        ins = Instruction(0, opcode, operands.split(", "), None, (), line)
        BUILDERS[ins.base](ins)(warp, None)
    return warp


def _int(warp: Warp, register: int) -> int:
    return int(warp.r[register, 7])


def _float(warp: Warp, register: int) -> float:
    return float(warp.r[register].view(np.float32)[7])


def _double(warp: Warp, register: int) -> float:
    both = np.array([warp.r[register, 7], warp.r[register + 1, 7]], np.uint32)
    return float(both.view(np.float64)[0])


def _pair(value: float) -> dict[str, int]:
    low, high = np.array([value], np.float64).view(np.uint32).tolist()
    return {"R4": low, "R5": high}


def test_64_bit_differences_carry():
    for a, b in [(5, 7), (7, 5), (1 << 40, 1), (3, 3), (0, 1 << 33)]:
        mask = (1 << 32) - 1
        warp = _run(
            "IADD3 R6, P0, -R2, R0, RZ",
            "IADD3.X R7, R1, ~R3, RZ, P0, !PT",
            R0=a & mask, R1=a >> 32, R2=b & mask, R3=b >> 32,
        )  # fmt: skip
        assert _int(warp, 6) | _int(warp, 7) << 32 == (a - b) % (1 << 64)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("IMAD R2, R0, R1, 0x5", (0x80000003 * 0xFFFFFFF0 + 5) % (1 << 32)),
        ("IMAD.HI.U32 R2, R0, R1, RZ", 0x80000003 * 0xFFFFFFF0 >> 32),
        ("IMAD.WIDE R2, R0, -0x10, RZ", 0x7FFFFFFD * 16 % (1 << 32)),
        ("LEA R2, R0, R1, 0x4", 0x20),
        ("LEA.HI R2, R0, R1, RZ, 0x1", 0xFFFFFFF1),
        ("SHF.R.S32.HI R2, RZ, 0x4, R0", 0xF8000000),
        ("SHF.R.U64 R2, R0, 0x4, R1", 0x08000000),
        ("SHF.L.U64.HI R2, R0, 0x4, R1", 0xFFFFFF08),
        ("SHF.R.W.U32 R2, R0, 0x24, R1", 0x08000000),
        ("LOP3.LUT R2, R0, R1, RZ, 0x3c, !PT", 0x7FFFFFF3),
        ("LOP3.LUT R2, R0, 0xff, R1, 0xb8, !PT", 0x800000F0),
        ("PRMT R2, R0, 0x5410, R1", 0xFFF00003),
        ("VIADDMNMX R2, R0, 0x1, R1, !PT", 0xFFFFFFF0),
        ("SEL R2, R0, R1, !PT", 0xFFFFFFF0),
        ("HFMA2.MMA R2, -RZ, RZ, 1.875, 0", 0x3F800000),
    ],
)
def test_integer_instructions(line, expected):
    warp = _run(line, R0=0x80000003, R1=0xFFFFFFF0)
    assert _int(warp, 2) == expected % (1 << 32)


def test_comparisons_of_64_bits():
    for a, b in [(1, 2), (2, 1), (-1, 0), (1 << 40, 5), (7, 7)]:
        words = {"R0": a & 0xFFFFFFFF, "R1": a >> 32 & 0xFFFFFFFF}
        words |= {"R2": b & 0xFFFFFFFF, "R3": b >> 32 & 0xFFFFFFFF}
        for name, holds in [("LT", a < b), ("GE", a >= b), ("EQ", a == b), ("NE", a != b)]:
            low = f"ISETP.{name}.U32.AND P0, PT, R0, R2, PT"
            warp = _run(low, f"ISETP.{name}.AND.EX P1, PT, R1, R3, PT, P0", **words)
            assert bool(warp.p[1, 3]) == holds, (name, a, b)


def test_floating_point_instructions():
    three = int(np.float32(3).view(np.uint32))
    warp = _run("FFMA R1, R0, -R0, 0.5", "MUFU.EX2 R2, R1", "FSEL R3, -R0, RZ, PT", R0=three)
    assert _float(warp, 1) == -8.5
    assert _float(warp, 2) == pytest.approx(2**-8.5, rel=1e-6)
    assert _float(warp, 3) == -3
    warp = _run("F2FP.BF16.F32.PACK_AB R1, R0, RZ", R0=int(np.float32(1 + 2**-8).view(np.uint32)))
    assert _int(warp, 1) == 0x3F800000, "ties go to even"
    warp = _run("FRND.F64 R6, R4", "DADD R8, R4, -R6", "DSETP.LT.AND P0, PT, R4, 2.75, PT",
                "F2I.F64 R10, R4", **_pair(2.625))  # fmt: skip
    assert (_double(warp, 6), _double(warp, 8)) == (3.0, -0.375)
    assert _int(warp, 10) == 3
    assert warp.p[0].all()


# ---- the scheduler ----------------------------------------------------------------------------


def _cost(text: str, stall: int = 1, write: int = 7, wait: int = 0) -> Cost:
    opcode = text.split()[0]
    return cost_of(Instruction(0, opcode, [], None, (), text, stall, write, 7, wait))


def _cycles(costs: list[Cost], *warps: list[Step], **options: Any) -> float:
    """Of warps of one scheduler; each of the others gets a single NOP for every one of them."""
    idle = [Step(len(costs), False, None)]
    block = [steps for warp in warps for steps in (warp, idle, idle, idle)]
    barriers = options.pop("barriers", {})
    return Multiprocessor([*costs, _cost("NOP")], [block], barriers, **options).run().cycles


def _steps(*at: int) -> list[Step]:
    return [Step(i, False, None) for i in at]


def test_units_limit_the_issue():
    costs = [_cost("FFMA"), _cost("IADD3"), _cost("MUFU.EX2"), _cost("IMAD"), _cost("DFMA")]
    n = 64
    # The last of n instructions issues n - 1 intervals after the first.
    for at, interval in [(0, 1), (1, 2), (3, 2), (4, 2)]:
        assert _cycles(costs, _steps(*[at] * n)) == (n - 1) * interval
    # Two exponentials wait in front of their unit.
    assert _cycles(costs, _steps(*[2] * n)) == pytest.approx((n - 1) * 8 - 16, abs=1)
    # Different units do not disturb each other.
    assert _cycles(costs, _steps(*[0, 1] * n)) == 2 * n - 1


def test_stalls_are_hidden_by_other_warps():
    costs = [_cost("FFMA", stall=4)]
    n = 32
    assert _cycles(costs, _steps(*[0] * n)) == 4 * (n - 1)
    four = _cycles(costs, *[_steps(*[0] * n)] * 4)
    assert four == pytest.approx(4 * n - 1, abs=1)


def test_scoreboards_and_branches():
    costs = [_cost("LDS", write=2), _cost("FFMA", wait=1 << 2), _cost("BRA")]
    assert _cycles(costs, _steps(0, 1)) == LATENCY["LDS"]
    taken = [Step(2, True, None), Step(1, False, None)]
    assert _cycles(costs, taken) == 1 + TAKEN_BRANCH


def test_a_wait_ends_when_the_copy_has_landed():
    costs = [_cost("UBLKCP"), _cost("SYNCS"), _cost("FFMA")]
    copier = [Step(1, False, ("arrive", 64, 1, 1600)), Step(0, False, ("copy", 64, 1600))]
    reader = [Step(1, False, ("wait", 64, 1)), Step(2, False, None)]
    cycles = _cycles(costs, copier, reader, barriers={64: 1}, bytes_per_cycle=16.0,
                     memory_latency=500.0)  # fmt: skip
    landed = 1600 / 16 + 500
    assert landed < cycles <= landed + WAKE + 10
    with pytest.raises(RuntimeError, match="every warp waits"):
        _cycles(costs, reader, barriers={64: 1})


def test_a_loop_over_lanes_with_different_values_ends():
    lanes: Any = np.arange(32)
    warp = _run("R2UR P0, UR14, R3", R3=lanes)
    assert (int(warp.u[14, 0]), warp.p[0].tolist()) == (0, [False] + [True] * 31)


def test_other_blocks_do_as_the_block_that_is_replayed():
    """Four blocks; this one's warps send 32 bytes a row, and it finishes rows 0 and 4."""
    costs = [_cost("STAS"), _cost("SYNCS"), _cost("FFMA")]
    messages, plan = 64, 72
    sums = [Step(1, False, ("arrive", plan, 1, 32)), Step(0, False, ("message", messages, 32, 0)),
            Step(1, False, ("wait", plan, 1)), Step(1, False, ("arrive", plan, 1, 32)),
            Step(0, False, ("message", messages, 32, 1)), Step(1, False, ("wait", plan, 2)),
            Step(2, False, None)]  # fmt: skip
    work = 500
    finish = [Step(1, False, ("arrive", messages, 1, 128)), Step(1, False, ("wait", messages, 1)),
              *_steps(*[2] * work), *[Step(0, False, ("broadcast", plan, 16))] * 2]  # fmt: skip
    sent = Sent(4, 32, {1: [(plan, 16)] * 2})
    cycles = _cycles(costs, finish, sums, barriers={messages: 1, plan: 1}, sent=sent)
    row = CLUSTER_LATENCY + work + CLUSTER_LATENCY
    assert 2 * row < cycles < 2 * row + 200, "both rows take as long"


def test_instructions_are_counted_by_phase():
    per_row: Any = [{("kernel", "run", "add_stages"): 20, ("kernel", "run"): 3},
                    {("kernel", "meet_stage", "add_stages"): 4}]  # fmt: skip
    per_element, once = by_phase(per_row, 64)
    assert per_element == {"maximum": 2.0, "sums": 10.0, "gradient": 0.0}
    assert once == [3.0, 0.0]


# ---- compiled code ------------------------------------------------------------------------------

SOURCE = """
#include <stdint.h>
struct Call { const float* in; float* out; int64_t* quotients; int64_t n; int divisor; };
__device__ __noinline__ float twice(float x) { return x + x; }
extern "C" __global__ void small(const __grid_constant__ Call call) {
  __shared__ float totals[2];
  float total = 0.0f;
  for (int64_t i = threadIdx.x; i < call.n; i += blockDim.x) {
    const float x = call.in[i];
    // Lanes part here and meet again.
    if (x > 0.5f) {
      for (int k = 0; k < static_cast<int>(i % 3); ++k) total += x;
    } else {
      total -= expf(x);
    }
    call.quotients[i] = (i * 1000003 - 77) / call.divisor;
  }
  for (int mask = 16; mask > 0; mask /= 2) total += __shfl_xor_sync(~0u, total, mask);
  switch (call.divisor) {  // by a jump table
    case -13: total *= 3.0f; break;
    case -12: total = 1.0f / total; break;
    case -11: total = tanhf(total); break;
    case -10: total = expm1f(total); break;
    case -9: total = logf(total); break;
    case -8: total = rsqrtf(total); break;
  }
  if (threadIdx.x % 32 == 0) totals[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) *call.out = twice(totals[0] + totals[1]);
}
"""


@pytest.fixture(scope="module")
def small_kernel(tmp_path_factory):
    compiler = build.nvcc()
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.cu").write_text(SOURCE)
    command = [compiler, "-std=c++17", "-O3", "-arch=sm_90a", "-lineinfo", "-cubin"]
    command += ["-o", "small.cubin", "small.cu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return parse(build.disassembled(folder / "small.cubin", "small"))


@pytest.mark.needs("nvcc", "nvdisasm")
def test_compiled_code_computes_what_its_source_says(small_kernel):
    n, divisor = 150, -13
    x = np.random.default_rng(0).random(n, np.float32)
    arrays = {0: np.zeros(1024, np.uint8), 1: np.zeros(64, np.uint8), 2: np.zeros(2048, np.uint8)}
    arrays[0][: 4 * n] = x.view(np.uint8)
    pointers = [1 << 44, 2 << 44, 3 << 44]
    parameters = np.array([*pointers, n, divisor & (1 << 32) - 1], np.int64).tobytes()
    launch = build.Launch("small", 1, 64, 1, 0, 1, parameters)
    cluster = Cluster(small_kernel, launch, GlobalMemory(arrays))
    cluster.run()
    i = np.arange(n)
    quotients = np.trunc((i * 1000003 - 77) / divisor).astype(np.int64)
    np.testing.assert_array_equal(arrays[2].view(np.int64)[:n], quotients)
    want = 6 * np.where(x > 0.5, x * (i % 3), -np.exp(x)).astype(np.float64).sum()
    assert arrays[1].view(np.float32)[0] == pytest.approx(want, rel=1e-5)
    # 64 threads go over 150 numbers: two rounds for all of them, a third for 22 lanes of warp 0.
    first, second = (len(w.steps) for w in cluster.blocks[0].warps)
    assert first > second


def test_an_unknown_instruction_is_an_error(small_kernel):
    broken = parse(LISTING.replace("S2R R5, SR_TID.X", "QUUX R5, R6"))
    launch = build.Launch("small", 1, 32, 1, 0, 1, bytes(64))
    with pytest.raises(NotImplementedError, match="QUUX"):
        Cluster(broken, launch, GlobalMemory({})).run()
