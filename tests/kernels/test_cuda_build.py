"""The CUDA sources through nvcc for every architecture that is shipped: what ptxas reports of all
kernels, and what the machine code of the important ones is made of. Needs no GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100")
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
# Registers per thread. resident: two blocks of 320 threads share a multiprocessor, or one of 576
# has it; stats: two of 320; streamed: two of 256; gradient: three of 256.
REGISTERS = {
    "resident": 96,
    "stats": 96,
    "streamed": 128,
    "gradient": 80,
    "outputs": 80,
    "scale": 48,
}
INSTANCES = {"resident": 5, "stats": 3, "streamed": 5, "gradient": 5, "outputs": 1, "scale": 3}


class Kernel(NamedTuple):
    """One line of ptxas' report."""

    name: str  # resident, streamed, ...
    symbol: str
    architecture: str
    registers: int
    stack: int
    spills: int


def _kernels(report: str) -> list[Kernel]:
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'"
        r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    found = []
    for symbol, architecture, stack, stores, loads, registers in pattern.findall(report):
        match = re.search(r"\d([a-z]+)_kernel", symbol)
        assert match, symbol
        spills = int(stores) + int(loads)
        found.append(Kernel(match[1], symbol, architecture, int(registers), int(stack), spills))
    return found


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """Every source compiled once for all architectures: {stem: (object, ptxas' report)}."""
    if NVCC is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("cuda")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    built = {}
    for source in SOURCES:
        target = folder / f"{source.stem}.o"
        command = [NVCC, "-std=c++17", "-O3", *targets, "-Xptxas", "-v", "-Xcompiler", "-fPIC"]
        command += [f"-I{ROOT / 'csrc/include'}", "-DPAPO_WITH_CUDA", "-Werror", "all-warnings"]
        done = subprocess.run(
            [*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        built[source.stem] = (target, done.stdout + done.stderr)
    return built


@pytest.fixture(scope="session")
def kernels(objects):
    return [kernel for _, report in objects.values() for kernel in _kernels(report)]


def _disassembler() -> str | None:
    found = shutil.which("cuobjdump")
    if found is None and (spec := importlib.util.find_spec("triton")) and spec.origin:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


@pytest.fixture(scope="session")
def machine_code(objects):
    """machine_code(stem, architecture, part of the symbol): the instructions of that one kernel."""
    tool = _disassembler()
    if tool is None:
        pytest.skip("no cuobjdump, in the toolkit or in triton's package")

    # nvdisasm lies beside it.
    env = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}

    @functools.cache
    def functions_of(stem: str, architecture: str) -> list[str]:
        target = objects[stem][0]
        command = [tool, "--dump-sass", "-arch", f"sm_{architecture}", str(target)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
        return text.split("Function : ")[1:]

    def code(stem: str, architecture: str, symbol: str) -> list[str]:
        functions = functions_of(stem, architecture)
        functions = [f for f in functions if symbol in f.split("\n")[0]]
        assert len(functions) == 1, f"{symbol}: {len(functions)} kernels"
        return re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*);", functions[0])

    return code


BF16 = "resident_kernelINS0_4BF16ES3_"


def _opcode(instruction: str) -> str:
    words = instruction.split()
    return words[1] if words[0].startswith("@") else words[0]


def test_every_source_is_in_the_build():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    listed = re.search(r"set\(PAPO_CUDA_SOURCES(.*?)\)", cmake, re.DOTALL)
    assert listed
    assert sorted(listed[1].split()) == [f"csrc/cuda/{s.name}" for s in SOURCES]


def test_every_kernel_for_every_architecture(kernels):
    for architecture in ARCHITECTURES:
        here = [k.name for k in kernels if k.architecture == f"sm_{architecture}"]
        assert {name: here.count(name) for name in set(here)} == INSTANCES


def test_no_spills_and_no_stack(kernels):
    assert [k for k in kernels if k.spills or k.stack] == []


def test_registers(kernels):
    assert [k for k in kernels if k.registers > REGISTERS[k.name]] == []
    # Clusters need sm_90: what is there before that is never launched.
    on_chip = [k for k in kernels if k.name in ("resident", "stats") and k.architecture == "sm_80"]
    assert all(k.registers < 8 for k in on_chip)


@pytest.mark.parametrize("architecture", ["90a", "100"])
def test_rows_come_by_bulk_copy_and_leave_in_whole_words(machine_code, architecture):
    opcodes = [_opcode(i) for i in machine_code("fused_loss", architecture, BF16)]
    assert any(o.startswith("UBLKCP") for o in opcodes), "global to shared"
    assert any(o.startswith("LDS.128") for o in opcodes)
    assert any(o.startswith("STG.E.128") for o in opcodes)
    assert not any(o.startswith(("LDL", "STL")) for o in opcodes), "local memory"
    # Messages between the blocks of a cluster, and its barrier.
    assert any(o.startswith("ST.ASYNC") or o.startswith("STAS") for o in opcodes)
    assert any(o.startswith("UCGABAR") for o in opcodes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_rows_move_16_bytes_at_a_time(machine_code, architecture):
    for stem, kernel in (("streamed", "streamed"), ("token_stats", "gradient")):
        symbol = f"{kernel}_kernelINS0_4BF16ES3_"
        opcodes = [_opcode(i) for i in machine_code(stem, architecture, symbol)]
        assert any(re.match(r"LDG\.E\S*\.128", o) for o in opcodes), kernel
        assert any(re.match(r"STG\.E\S*\.128", o) for o in opcodes), kernel


class Block(NamedTuple):
    """A run without a branch: its instructions, and how many of them are of a kind."""

    length: int
    exponentials: int
    maxima: int
    stores: int  # of 16 bytes


def _blocks(instructions: list[str]) -> list[Block]:
    blocks, opcodes = [], []
    for instruction in instructions:
        opcode = _opcode(instruction)
        opcodes.append(opcode)
        if opcode.startswith(("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "WARPSYNC")):

            def count(start: str, opcodes: list[str] = opcodes) -> int:
                return sum(o.startswith(start) for o in opcodes)

            maxima = count("HMNMX2") + count("VHMNMX")
            blocks.append(Block(len(opcodes), count("MUFU.EX2"), maxima, count("STG.E.128")))
            opcodes = []
    return blocks


@pytest.mark.parametrize(
    ("architecture", "sums", "across"), [("90a", 8.9, 11.4), ("100", 5.8, 8.5)]
)
def test_instructions_per_element(machine_code, architecture, sums, across):
    """In the loops over four words of a lane, 32 elements; docs/kernels.md has the counts. sm_100
    works on pairs. `across`: rows off a 16-byte boundary that hold masked logits."""
    for stem, symbol in (("fused_loss", BF16), ("statistics", "stats_kernelINS0_4BF16E")):
        blocks = _blocks(machine_code(stem, architecture, symbol))
        loops = [b.length / 32 for b in blocks if b.exponentials == 32 and not b.stores]
        assert len(loops) == 4, "aligned or not, with masked logits or without"
        assert min(loops) <= sums
        assert max(loops) <= across
        tops = [b.length / 32 for b in blocks if b.maxima >= 8 and not b.exponentials]
        assert min(tops) <= 0.95
    gradients = sorted(
        b.length / 32
        for b in _blocks(machine_code("fused_loss", architecture, BF16))
        if b.exponentials == 32 and b.stores == 4
    )
    assert len(gradients) == 2, "a multiple of p, and in general"
    assert gradients[0] <= 5.8
    assert gradients[1] <= 10.3
