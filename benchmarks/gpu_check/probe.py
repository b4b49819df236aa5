"""The machine's ceilings, and what it can do, in a few seconds."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_check import facts, rehearsal, target
from benchmarks.gpu_check.files import Notes
from benchmarks.harness import Case, measure, one_line

CLUSTERS = (1, 2, 4, 8, 16)
SHARED_KIB = (113, 227)
THREADS = 192  # of a block, as those of which two share a multiprocessor have

# The driver's enumerators (cuda.h).
_MAX_DYNAMIC_SHARED, _NON_PORTABLE_CLUSTER, _CLUSTER_DIMENSION = 8, 14, 4
_EMPTY_KERNEL = (
    b".version 7.8\n.target sm_90\n.address_size 64\n.visible .entry empty()\n{\nret;\n}"
)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of a cluster's extent."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def active_clusters() -> dict[str, int | str]:
    """How many clusters of each size run at a time, by blocks of a cluster and shared memory of a
    block; for a kernel without registers, so that only clusters and memory limit."""
    driver = ctypes.CDLL("libcuda.so.1")
    torch.zeros(1, device=target.device())  # torch's context is current from here on

    def call(name: str, *arguments: Any) -> None:
        code = getattr(driver, name)(*arguments)
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}")

    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), _EMPTY_KERNEL)
    call("cuModuleGetFunction", ctypes.byref(kernel), module, b"empty")
    call("cuFuncSetAttribute", kernel, _NON_PORTABLE_CLUSTER, 1)
    found: dict[str, int | str] = {}
    for kib in SHARED_KIB:
        call("cuFuncSetAttribute", kernel, _MAX_DYNAMIC_SHARED, kib * 1024)
        for cluster in CLUSTERS:
            config = _Config((cluster, 1, 1), (THREADS, 1, 1), kib * 1024)
            extent = _Attribute(_CLUSTER_DIMENSION, 0, (cluster, 1, 1))
            config.attributes, config.count = ctypes.pointer(extent), 1
            count = ctypes.c_int()
            arguments = (ctypes.byref(count), kernel, ctypes.byref(config))
            try:
                call("cuOccupancyMaxActiveClusters", *arguments)
                found[f"{cluster} x {kib} KiB"] = count.value
            except RuntimeError as error:
                found[f"{cluster} x {kib} KiB"] = str(error)
    return found


def copy_rate() -> dict[str, float]:
    """GB/s of a copy of bfloat16 numbers, read and written bytes both counted."""
    count = 2**12 if rehearsal.active() else 2**30
    source = torch.empty(count, dtype=torch.bfloat16, device=target.device()).normal_()
    into = torch.empty_like(source)
    figures = _figures(lambda: into.copy_(source))
    return {**figures, "GB/s": 4 * count / figures["ms"] / 1e6}


def product_rate() -> dict[str, float]:
    """TFLOP/s of a bfloat16 product of random matrices."""
    n = 64 if rehearsal.active() else 8192
    a, b, out = torch.empty(3, n, n, dtype=torch.bfloat16, device=target.device()).normal_()
    figures = _figures(lambda: torch.mm(a, b, out=out))
    return {**figures, "TFLOP/s": 2 * n**3 / figures["ms"] / 1e9}


def _figures(run: Callable[[], Any]) -> dict[str, float]:
    case = Case("", run)
    measure([case], target.rounds(7), target.stopwatch(), target.rounds(3))
    if case.failure:
        raise RuntimeError(case.failure)
    return {**case.spread, "SM MHz": statistics.median(case.mhz)}


def wide_products() -> dict[str, str]:
    """Whether a product of bfloat16 matrices can be written, and added, in float32."""
    ones = torch.ones(64, 64, dtype=torch.bfloat16, device=target.device())
    out = torch.zeros(64, 64, device=target.device())

    def tried(run: Callable[[], Any], expected: float) -> str:
        try:
            run()
            right = bool((out == expected).all())
        except Exception as error:
            return one_line(error)
        return "works" if right else f"is wrong: {out[0, 0].item()} for {expected}"

    wide = {"out_dtype": torch.float32, "out": out}
    return {
        "torch.mm out_dtype": tried(lambda: torch.mm(ones, ones, **wide), 64.0),
        "torch.addmm out_dtype": tried(lambda: torch.addmm(out, ones, ones, **wide), 128.0),
    }


def device_facts() -> dict[str, Any]:
    """What torch says of the device."""
    if rehearsal.active():
        return {"name": "Rehearsed GPU", "capability": "9.0"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "L2 bytes": properties.L2_cache_size,
        "memory bytes": properties.total_memory,
        "shared bytes per block": getattr(properties, "shared_memory_per_block_optin", None),
    }


def run(notes: Notes) -> int:
    """Every reading is tried; one that fails leaves its error and does not stop the rest."""
    if not rehearsal.active() and not torch.cuda.is_available():
        print("gpu-check needs a CUDA device; torch sees none")
        return 1
    notes.put(device=device_facts(), before=facts.gpu_now())
    for name, read in (
        ("copy", copy_rate),
        ("product", product_rate),
        ("wide products", wide_products),
        ("active clusters", active_clusters),
    ):
        try:
            found: Any = read()
        except Exception as error:
            found = {"failed": one_line(error)}
        notes.put(**{name: found})
        print(name, found)
    notes.put(after=facts.gpu_now())
    return 0
