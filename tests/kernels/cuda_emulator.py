"""The CUDA sources compiled for this machine's CPU, where every CUDA thread is a fiber.

The kernels, launchers and wrappers are the real ones. Only csrc/cuda/machine.cuh, the layer of PTX
instructions, is replaced; tests/cpp/emulated_machine.h says what that reports. The library is built
once, for all processes and runs.

`EmulatedBackend` is the CUDA backend for CPU tensors, under a name of its own. Within `emulated()`
the backend called "cuda" serves them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from papo_kernels.backends import choice as backend
from papo_kernels.backends import tuning
from papo_kernels.backends.native import CUDA
from papo_kernels.backends.tiles import choose_tile

ROOT = Path(__file__).parents[2]
SOURCES = ("calls", "from_state", "resident", "resident_stats", "scale", "streamed")
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-DPAPO_EMULATED", "-DPAPO_WITH_CUDA"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-Icsrc/include", "-Icsrc/cuda", "-Itests/cpp"),
    # nvcc fuses a product and a sum wherever it can.
    *("-ffp-contract=fast", "-fexpensive-optimizations"),
    *(["-mfma"] if platform.machine() in ("x86_64", "AMD64") else []),
)

I32, I64, F64, PTR = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_size_t


def _struct(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


# csrc/include/papo/params.h and csrc/cuda/tile.h, field by field.
Matrix = _struct(
    "Matrix", ("data", PTR), ("rows", I64), ("cols", I64), ("row_stride", I64), ("dtype", I32)
)
RowParams = _struct(
    "RowParams",
    ("temperature", F64),
    ("softcap", F64),
    ("vocab_size", I64),
    ("sharded", ctypes.c_bool),
    ("temperatures", PTR),
)
TokenStatsOut = _struct(
    "TokenStatsOut",
    *((name, PTR) for name in ("logp", "entropy", "unit_polarity", "lse", "state")),
)
TokenStatsGrads = _struct(
    "TokenStatsGrads", *((name, PTR) for name in ("logp", "entropy", "unit_polarity", "lse"))
)
TokenInputs = _struct(
    "TokenInputs",
    *(
        (name, PTR)
        for name in (
            "targets",
            "advantages",
            "token_weight",
            "old_logp",
            "ref_logp",
            "log_ratio",
            "kl_weight",
            "entropy_weight",
            "state",
        )
    ),
)
Objective = _struct(
    "Objective",
    ("surrogate", I32),
    ("kl_estimator", I32),
    ("kl_slope_of_k2", ctypes.c_bool),
    ("kl_ratio", ctypes.c_bool),
    ("numbers", F64 * 14),
)
Weighting = _struct(
    "Weighting",
    ("shape", I32),
    ("strength", F64),
    ("dead_zone", F64),
    ("phase", PTR),
    ("sigma", PTR),
    ("scale", PTR),
)
PolicyLossOut = _struct(
    "PolicyLossOut",
    *(
        (name, PTR)
        for name in (
            "token_loss",
            "logp",
            "entropy",
            "unit_polarity",
            "polarity",
            "weight",
            "ratio",
            "clip_side",
        )
    ),
)
TileChoice = _struct(
    "TileChoice",
    *(
        (name, I32)
        for name in (
            "kernel",
            "cluster",
            "warps",
            "stages",
            "ring",
            "blocks",
            "stats",
            "stats_teams",
            "stats_ring",
            "stats_blocks",
        )
    ),
)
Launch = _struct(
    "Launch", ("threads", I32), ("device", I32), ("stream", PTR), ("choice", TileChoice)
)
DeviceLimits = _struct(
    "DeviceLimits",
    ("multiprocessors", I32),
    ("shared_per_block", I32),
    ("shared_per_multiprocessor", I32),
    ("max_cluster", I32),
)
Tile = _struct(
    "Tile",
    *(
        (name, I32)
        for name in (
            "cluster",
            "warps",
            "slice",
            "stage",
            "stages",
            "ring",
            "blocks",
            "summing",
            "stage_bytes",
            "shared_bytes",
        )
    ),
)
StatsTile = _struct(
    "StatsTile", *((name, I32) for name in ("teams", "ring", "blocks", "rounds", "shared_bytes"))
)
Chosen = _struct("Chosen", ("tile", Tile), ("stats", StatsTile), ("error", ctypes.c_char_p))

H100 = DeviceLimits(132, 232448, 233472, 16)
# Made-up devices, as arguments of `emulated`. The small ones spread short rows over clusters.
DEVICES: dict[str, dict[str, int]] = {
    # Blocks of 12 KB hold three rows: sums run ahead of gradients.
    "ahead": {},
    # Two buffers fit at most: a row's sums wait for the gradient of the row before.
    "in_turn": {"shared_per_block": 9000, "shared_per_multiprocessor": 6000},
    # As on sm_80: rows are streamed.
    "no_clusters": {"max_cluster": 0},
    "h100": {name: getattr(H100, name) for name, _ in H100._fields_[1:]},
}


def _built() -> Path:
    """The kernels as a shared library, compiled when what it is made of has changed."""
    inputs = sorted(
        path
        for pattern in ("csrc/include/papo/*", "csrc/cuda/*", "tests/cpp/emulated_*")
        for path in ROOT.glob(pattern)
    )
    made_of = [repr(FLAGS).encode(), *(path.read_bytes() for path in inputs)]
    name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    shared = folder / f"{name}.so"
    with open(folder / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=folder) as partial:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            sources = [f"csrc/cuda/{stem}.cu" for stem in SOURCES] + ["tests/cpp/emulated_cuda.cpp"]
            objects = [f"{partial}/{Path(source).stem}.o" for source in sources]

            def compile_one(source: str, target: str) -> None:
                command = ["g++", *FLAGS, "-x", "c++", "-c", source, "-o", target]
                subprocess.run(command, cwd=ROOT, check=True)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, sources, objects))
            subprocess.run(["g++", "-shared", *objects, "-o", f"{partial}/all.so"], check=True)
            os.replace(f"{partial}/all.so", shared)
    return shared


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The emulated kernels behind the C interface of tests/cpp/emulated_cuda.cpp."""
    lib = ctypes.CDLL(str(_built()))
    for name in ("token_stats_fwd", "token_stats_bwd", "policy_loss", "scale"):
        getattr(lib, f"emulated_{name}").restype = ctypes.c_char_p
    lib.emulated_choose.restype = Chosen
    lib.emulated_choose.argtypes = [
        ctypes.POINTER(TileChoice),
        I64,
        I32,
        ctypes.POINTER(DeviceLimits),
    ]
    lib.emulated_check_tile.restype = ctypes.c_char_p
    lib.emulated_check_tile.argtypes = [I64, I32, ctypes.POINTER(TileChoice)]
    lib.emulated_allow.argtypes = [PTR, I64, ctypes.c_bool]
    return lib


class Native:
    """What papo_kernels._C offers the CUDA backend, on the emulated machine."""

    RowParams = RowParams
    Objective = Objective
    Weighting = Weighting
    TileChoice = TileChoice
    Launch = Launch

    def __init__(self) -> None:
        self.lib = library()

    def _call(self, name: str, matrices: list[ctypes.Structure], *args: object) -> None:
        """Kernels may touch the elements of `matrices` and no others, and write the last alone."""
        self.lib.emulated_forget()
        for m in matrices:
            width = (2, 2, 4)[m.dtype]
            if m.data and m.rows:
                extent = ((m.rows - 1) * m.row_stride + m.cols) * width
                self.lib.emulated_allow(m.data, extent, m is matrices[-1])
        passed = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else PTR(a) for a in args]
        message = getattr(self.lib, f"emulated_{name}")(*passed)
        if message is not None:
            raise RuntimeError(message.decode())

    def token_stats_fwd(self, logits, targets, state, row, out, launch):
        matrix, nothing = Matrix(*logits), Matrix(0, 0, 0, 0, 0)
        args = (matrix, targets, state, row, TokenStatsOut(*out), launch)
        self._call("token_stats_fwd", [matrix, nothing], *args)

    def token_stats_bwd(self, logits, targets, state, grads, row, dlogits, launch):
        matrices = [Matrix(*logits), Matrix(*dlogits)]
        args = (targets, state, TokenStatsGrads(*grads), row, matrices[1], launch)
        self._call("token_stats_bwd", matrices, matrices[0], *args)

    def policy_loss(self, logits, tokens, objective, weighting, row, out, dlogits, launch):
        matrices = [Matrix(*logits), Matrix(*dlogits)]
        args = (TokenInputs(*tokens), objective, weighting, row, PolicyLossOut(*out))
        self._call("policy_loss", matrices, matrices[0], *args, matrices[1], launch)

    def scale(self, matrix, factor, launch):
        self._call("scale", [Matrix(*matrix)], Matrix(*matrix), factor, launch)

    def check_tile(self, columns, dtype, device, choice):
        message = self.lib.emulated_check_tile(columns, dtype, ctypes.byref(choice))
        if message is not None:
            raise ValueError(message.decode())

    @property
    def widest_cluster(self) -> int:
        """Blocks of the largest cluster launched."""
        return int(self.lib.emulated_widest_cluster())

    @property
    def launches(self) -> int:
        return int(self.lib.emulated_launches())


@contextlib.contextmanager
def emulated(
    shared_per_block: int = 24000,
    shared_per_multiprocessor: int = 26000,
    max_cluster: int = 8,
    resident: int = 2,
    seed: int = 0,
) -> Iterator[Native]:
    """Backend "cuda" serves CPU tensors, on a device of these limits.

    Args:
        max_cluster: 0: as on sm_80, without clusters.
        resident: clusters that run at a time, or blocks of kernels that use none.
        seed: of the order in which threads run and transfers arrive.
    """
    native = Native()
    limits = DeviceLimits(2, shared_per_block, shared_per_multiprocessor, max_cluster)
    native.lib.emulated_configure(ctypes.byref(limits), resident, seed)

    def launch(native: Native, logits: Tensor, columns: int) -> ctypes.Structure:
        if columns == 0:
            return Launch(1, 0, 0)
        choice = choose_tile(native, logits.device, logits.dtype, columns, tuning.forced())
        return Launch(1, 0, 0, choice)

    backend._choose.cache_clear()
    with (
        mock.patch("papo_kernels.backends.extension.module", lambda: native),
        mock.patch.object(CUDA, "_launch", launch),
        mock.patch.object(CUDA, "capabilities", replace(CUDA.capabilities, devices=("cpu",))),
        mock.patch.object(CUDA, "why_unavailable", lambda device: None),
    ):
        yield native
    backend._choose.cache_clear()


class EmulatedBackend:
    """The CUDA backend for CPU tensors.

    Every call starts from the same state of the emulated machine, so its result depends on its
    arguments alone.

    Args:
        device: a key of `DEVICES`.
    """

    capabilities = replace(CUDA.capabilities, devices=("cpu",))

    def __init__(self, device: str) -> None:
        self.name = f"emulated_{device}"
        self._device = DEVICES[device]

    def why_unavailable(self, device: torch.device) -> str | None:
        return None

    def token_stats_fwd(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        with emulated(**self._device):
            return CUDA.token_stats_fwd(*args, **options)

    def token_stats_bwd(self, *args: Any, **options: Any) -> Tensor:
        with emulated(**self._device):
            return CUDA.token_stats_bwd(*args, **options)

    def policy_loss_fwd(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        with emulated(**self._device):
            return CUDA.policy_loss_fwd(*args, **options)

    def scale_(self, *args: Any, **options: Any) -> None:
        with emulated(**self._device):
            CUDA.scale_(*args, **options)


@contextlib.contextmanager
def registered(served: EmulatedBackend) -> Iterator[None]:
    """A call may ask for this backend by its name."""
    with (
        mock.patch.dict(backend._BY_NAME, {served.name: lambda: served}),
        mock.patch.object(backend, "BACKENDS", (*backend.BACKENDS, served.name)),
    ):
        yield


def at_offset(x: Tensor, stride: int, elements: int) -> Tensor:
    """A copy of `x [N, V]` with another row stride that starts `elements` elements behind a 16-byte
    boundary, and ends where its storage ends."""
    n, v = x.shape
    per_word = 16 // x.element_size()
    storage = torch.full((per_word + elements + (n - 1) * stride + v,), torch.nan, dtype=x.dtype)
    skip = -storage.data_ptr() // x.element_size() % per_word + elements
    view = storage.as_strided((n, v), (stride, 1), skip)
    return view.copy_(x)
