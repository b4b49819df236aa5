"""The CUDA sources through nvcc: what ptxas reports of the kernels, and what their loops hold."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.issue_model.build import ROOT, nvcc, run_tool

from .loops import Round, rounds
from .rules import broken

ARCHITECTURES = ("80", "90a", "100")
# Registers a thread. resident: two blocks of 320 threads share a multiprocessor, or one of 576 has
# it; stats: two of 320; streamed: two of 256; gradient: three of 256.
MOST_REGISTERS = {
    "resident": 96,
    "stats": 96,
    "streamed": 128,
    "gradient": 80,
    "outputs": 80,
    "scale": 48,
}
# By the loads of a word, and whether it is raised. "off": rows start off a 16-byte boundary.
LOOPS_OF_SUMS = {
    (1, False): "sums",
    (1, True): "sums, masked",
    (2, False): "sums, off",
    (2, True): "sums, off, masked",
}
LOOPS_OF_GRADIENTS = ("gradient, multiple of p", "gradient")
TYPES = {"4BF16": "bf16", "3F16": "fp16", "3F32": "fp32"}


class Kernel(NamedTuple):
    """One kernel of one architecture."""

    name: str  # resident, streamed, ...
    types: tuple[str, ...]  # of the logits and of their gradient; "own temperatures"
    architecture: str
    registers: int
    stack: int  # bytes
    code: tuple[str, ...]  # its instructions

    @property
    def opcodes(self) -> list[str]:
        return [opcode(instruction) for instruction in self.code]

    def __str__(self) -> str:
        return f"{self.name}<{', '.join(self.types)}> sm_{self.architecture}"


def opcode(instruction: str) -> str:
    words = instruction.split()
    return words[1] if words[0].startswith("@") else words[0]


def kernel_name(symbol: str) -> str:
    """resident, streamed, ... of a mangled name."""
    match = re.search(r"\d([a-z]+)_kernel", symbol)
    if match is None:
        raise ValueError(f"{symbol} is no kernel of csrc/cuda")
    return match[1]


def types_of(symbol: str) -> tuple[str, ...]:
    """The template arguments; a substitution (S3_) repeats the first, and Lb1 is `kOwn`."""
    found = re.search(r"_kernelI(.*?)EEv", symbol)
    names = re.findall(r"4BF16|3F16|3F32|S\d_(?=E|L|$)", found[1]) if found else []
    types = tuple(TYPES.get(name, TYPES.get(names[0], "")) for name in names)
    return (*types, "own temperatures") if found and "Lb1E" in found[1] else types


def resource_usage(binary: Path) -> list[tuple[str, str, int, int]]:
    """(symbol, architecture, registers, bytes of stack) of every kernel in an object or library."""
    text = run_tool("cuobjdump", "--dump-resource-usage", str(binary))
    found, architecture, symbol = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"Function (\S+):", line.strip()):
            symbol = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found.append((symbol, architecture, int(match[1]), int(match[2])))
    return found


def _compile(source: Path, folder: Path) -> Path:
    compiler, target = nvcc(), folder / f"{source.stem}.o"
    if compiler is None:
        raise RuntimeError("no nvcc: set CUDACXX or PATH")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [compiler, "-std=c++17", "-O3", *targets, "-Xcompiler", "-fPIC"]
    command += [f"-I{ROOT / 'csrc/include'}", "-DPAPO_WITH_CUDA", "-Werror", "all-warnings"]
    command += ["-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-4000:])
    return target


def _kernels_in(binary: Path) -> list[Kernel]:
    code = {}
    for architecture in ARCHITECTURES:
        text = run_tool("cuobjdump", "--dump-sass", "-arch", f"sm_{architecture}", str(binary))
        for function in text.split("Function : ")[1:]:
            symbol = function.split("\n")[0].strip()
            found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*);", function)
            code[symbol, architecture] = tuple(found)
    return [
        Kernel(
            *(kernel_name(symbol), types_of(symbol), architecture),
            *(registers, stack, code[symbol, architecture]),
        )
        for symbol, architecture, registers, stack in resource_usage(binary)
    ]


def compiled() -> list[Kernel]:
    """Every kernel for every architecture. A warning of nvcc is an error."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = pool.map(lambda source: _compile(source, Path(folder)), sources)
        return [kernel for binary in objects for kernel in _kernels_in(binary)]


def counts(kernel: Kernel) -> dict[str, float]:
    """Registers and, of the kernels on chip, instructions per element of bfloat16 logits in one
    round of their loops."""
    found: dict[str, float] = {"registers": kernel.registers}
    on_chip = kernel.name in ("resident", "stats") and kernel.architecture != "80"
    if not on_chip or kernel.types[0] != "bf16":
        return found
    lengths: dict[str, float] = {}
    for r in rounds(kernel.code):
        elements = r.exponentials or 8 * r.loads
        name = loop_name(r)
        lengths[name] = min(r.length / elements, lengths.get(name, r.length))
    names = ["maximum", *LOOPS_OF_SUMS.values()]
    names += LOOPS_OF_GRADIENTS if kernel.name == "resident" else ()
    return found | {name: lengths[name] for name in names}


def loop_name(r: Round) -> str:
    """What a loop over words of bfloat16 logits is for; "" if it is none that is counted."""
    if r.maxima == 2 * r.loads and not r.exponentials:
        return "maximum"
    # The loops of soft caps have maxima of floats.
    if r.exponentials == 0 or r.float_maxima:
        return ""
    if r.stores == 0:
        return LOOPS_OF_SUMS.get((8 * r.loads // r.exponentials, r.maxima > 0), "")
    if r.stores < r.loads:  # off a 16-byte boundary
        return ""
    return LOOPS_OF_GRADIENTS[r.maxima > 0]


def broken_rules(kernel: Kernel) -> list[str]:
    """What the kernel's machine code must not be, and is."""
    opcodes = kernel.opcodes

    def has(pattern: str) -> bool:
        return any(re.match(pattern, o) for o in opcodes)

    rules = {
        "it uses the stack": kernel.stack == 0,
        "it uses local memory": not has("LDL|STL"),
        f"it has more than {MOST_REGISTERS[kernel.name]} registers":
            kernel.registers <= MOST_REGISTERS[kernel.name],
    }  # fmt: skip
    on_chip = kernel.name in ("resident", "stats")
    if on_chip and kernel.architecture == "80":
        rules["code that needs clusters is there without them"] = kernel.registers < 8
    elif on_chip:
        rules["rows do not come by bulk copy"] = has("UBLKCP")
        rules["shared memory is not read by words"] = has(r"LDS\.128")
    if kernel.name == "resident" and kernel.architecture != "80":
        rules["the gradient is not stored by words"] = has(r"STG\.E\.128")
        rules["blocks send no messages"] = has(r"ST\.ASYNC|STAS")
        rules["there is no barrier of the cluster"] = has("UCGABAR")
    if kernel.name in ("streamed", "gradient"):
        rules["rows are not read by words"] = has(r"LDG\.E\S*\.128")
        rules["the gradient is not stored by words"] = has(r"STG\.E\S*\.128")
    return broken(f"cuda {kernel}", rules)
