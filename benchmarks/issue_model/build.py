"""Compiles csrc/cuda for sm_90a with line information, and asks its launchers what they launch."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-lineinfo"]
FLAGS += ["-Xptxas", "-v", "-Xcompiler", "-fPIC", "-DPAPO_WITH_CUDA"]


@dataclass(frozen=True)
class Launch:
    """A launch as the CUDA runtime would get it. `parameters`: the bytes of the kernel's argument,
    and what lies behind it."""

    symbol: str
    blocks: int
    threads: int
    cluster: int
    shared_bytes: int
    blocks_per_multiprocessor: int
    parameters: bytes


def nvcc() -> str | None:
    """The compiler, or None."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def binary_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: that of the triton package, else of the toolkit."""
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin" / name
        if bundled.exists():
            return str(bundled)
    return shutil.which(name)


def run_tool(name: str, *arguments: str) -> str:
    """What cuobjdump or nvdisasm prints."""
    tool = binary_tool(name)
    if tool is None:
        raise RuntimeError(f"no {name}, in triton's package or on PATH")
    # cuobjdump starts nvdisasm, which lies beside it.
    env = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, env=env)
    return done.stdout


def _run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def disassembled(cubin: Path, symbol: str) -> str:
    """nvdisasm's text of the kernel of this name, with encodings and line information, and behind
    it the bytes of its jump table if it has one."""
    text = run_tool("nvdisasm", "-hex", "-gi", str(cubin))
    table = re.search(rf"^\.nv\.constant2\.{re.escape(symbol)}:\n(.*?)\n\n", text, re.M | re.S)
    for part in text.split("\n.text.")[1:]:
        if part.startswith(f"{symbol}:"):
            return part.split("\n//-----")[0] + ("\n" + table[1] if table else "")
    raise KeyError(symbol)


class Build:
    """The kernels of one source tree, compiled into a folder that is named by their content.

    root: a checkout of the project; cache: where builds are kept.
    """

    def __init__(self, root: Path = ROOT, cache: Path | None = None) -> None:
        self.root = root
        self.sources = sorted((root / "csrc/cuda").glob("*.cu"))
        inputs = [
            p for p in sorted((root / "csrc").rglob("*")) if p.suffix in (".cu", ".cuh", ".h")
        ]
        capture = Path(__file__).with_name("capture.cpp")
        digest = hashlib.sha256(" ".join(FLAGS).encode())
        for path in [*inputs, capture]:
            digest.update(path.read_bytes())
        self.folder = (cache or ROOT / "build/issue_model") / digest.hexdigest()[:16]
        if not (self.folder / "capture").exists():
            self._compile(capture)
        self.registers = dict(
            line.split() for line in (self.folder / "registers").read_text().splitlines()
        )

    def _compile(self, capture: Path) -> None:
        compiler = nvcc()
        if compiler is None:
            raise RuntimeError("no nvcc: set CUDACXX or PATH")
        self.folder.mkdir(parents=True, exist_ok=True)
        include = f"-I{self.root / 'csrc/include'}"
        objects, report = [], ""
        for source in self.sources:
            target = self.folder / f"{source.stem}.o"
            report += _run([compiler, *FLAGS, include, "-c", str(source), "-o", str(target)])
            _run([str(binary_tool("cuobjdump")), "-xelf", "all", target.name], self.folder)
            objects.append(str(target))
        found = re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", report, re.DOTALL)
        lines = "".join(f"{symbol} {count}\n" for symbol, count in found)
        (self.folder / "registers").write_text(lines)
        command = [compiler, "-std=c++17", "-DPAPO_WITH_CUDA", include, "-cudart", "none"]
        _run([*command, str(capture), *objects, "-o", str(self.folder / "capture")])

    def launches(self, task: str, dtype: str, out: str, rows: int, columns: int) -> list[Launch]:
        """What a call on `rows` x `columns` logits launches.

        task: stats, loss, entropy (a loss with an entropy bonus), inplace, state (a gradient from
        a given state); dtype, out: bf16, fp16 or fp32, of the logits and of their gradient.
        """
        command = [str(self.folder / "capture"), str(self.folder / "registers"), task, dtype, out]
        found = []
        for line in _run([*command, str(rows), str(columns)]).splitlines():
            symbol, *fields, parameters = line.split()
            blocks, threads, cluster, shared, each = map(int, fields)
            found.append(
                Launch(symbol, blocks, threads, cluster, shared, each, bytes.fromhex(parameters))
            )
        return found

    def listing(self, symbol: str) -> str:
        """nvdisasm's text of one kernel, with encodings and line information."""
        for cubin in sorted(self.folder.glob("*.cubin")):
            if symbol.encode() in cubin.read_bytes():
                return disassembled(cubin, symbol)
        raise KeyError(symbol)
