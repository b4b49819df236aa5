"""What a test runs on, which tests a run has, and every skip of the suite.

``backend`` is a test argument over reference, cpu, triton and cuda; the last two need a CUDA device
(marked ``gpu``) and are shown as skipped without one. There the CUDA kernels run as ``emulated``,
on three small devices of kernels/cuda_emulator.py. ``--backends a,b`` overrides.

Fewer tests run in three ways, all with fewer rows. ``TRITON_INTERPRET=1``: triton alone, which is
interpreted at about 50 ms a row. The emulated backends, in any run. ``--fast``: reference and cpu,
and nothing that needs more than Python or starts a process. What would only repeat what another
backend or the whole suite shows is left out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import multiprocessing.process
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar
from unittest import mock

import pytest
import torch

from papo_kernels.backends import named

from .peers.suites import PEERS

try:
    import hypothesis
except ImportError:  # `make gpu-check` runs where there is no more than pytest
    hypothesis = None  # type: ignore[assignment]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU_BACKENDS = ("triton", "cuda")
EMULATED = ("emulated_ahead", "emulated_in_turn", "emulated_no_clusters")
T = TypeVar("T")

# The same examples in every run: a red test is the commit's doing. An interpreted kernel is slow.
if hypothesis is not None:
    examples = 2 if INTERPRETED else 30
    hypothesis.settings.register_profile(
        "papo", deadline=None, derandomize=True, database=None, max_examples=examples
    )
    hypothesis.settings.load_profile("papo")

# Files that import what is not installed; a run's header names them.
collect_ignore_glob = [
    *(["kernels/test_properties.py"] if hypothesis is None else []),
    *(["kernels/test_triton_*.py"] if importlib.util.find_spec("triton") is None else []),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backends", help="comma-separated: reference, cpu, triton, cuda, emulated")
    parser.addoption(
        "--fast", action="store_true", help="reference and cpu, and no test that starts a process"
    )


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "plumbing: of torch around a kernel; neither interpreted nor emulated nor in a fast run",
        "needs(*names): keys of NEEDS in tests/conftest.py, without which the test is skipped",
        "not_for(reason, **parameters): the case of these parameters is skipped",
    ):
        config.addinivalue_line("markers", line)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"not collected: {', '.join(collect_ignore_glob)}"] if collect_ignore_glob else []


# ---- backends -----------------------------------------------------------------------------------


def _backends(config: pytest.Config) -> list[str]:
    asked = config.getoption("--backends")
    if asked:
        names = [name.strip() for name in asked.split(",")]
        return [x for name in names for x in (EMULATED if name == "emulated" else (name,))]
    if INTERPRETED:
        return ["triton"]
    if _fast(config):
        return ["reference", "cpu"]
    return ["reference", "cpu", *GPU_BACKENDS, *(() if torch.cuda.is_available() else EMULATED)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    params = [pytest.param(name, marks=_marks(name)) for name in _backends(metafunc.config)]
    # Session scope lets hypothesis tests take `backend` and `device`.
    metafunc.parametrize("backend", params, scope="session", indirect=True)


def _marks(backend: str) -> list[pytest.MarkDecorator]:
    if backend in EMULATED:
        return [pytest.mark.needs("g++")]
    marks = [pytest.mark.gpu] if _runs_on_gpu(backend) else []
    return [*marks, pytest.mark.needs("CUDA kernels")] if backend == "cuda" else marks


def _runs_on_gpu(backend: str) -> bool:
    return backend in GPU_BACKENDS and not INTERPRETED


def _is_slow(backend: str) -> bool:
    return INTERPRETED or backend in EMULATED


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend under test, for a call's `backend` argument."""
    with contextlib.ExitStack() as stack:
        if request.param in EMULATED:
            from tests.kernels.cuda_emulator import EmulatedBackend, registered

            device = request.param.removeprefix("emulated_")
            stack.enter_context(registered(EmulatedBackend(device)))
        yield request.param


@pytest.fixture(scope="session")
def device(backend: str) -> str:
    """Where the tensors of a test of `backend` live."""
    return "cuda" if _runs_on_gpu(backend) else "cpu"


@pytest.fixture(scope="session")
def sizes(backend: str, pytestconfig: pytest.Config) -> Callable[[T, T], T]:
    """``sizes(full, small)``: the second in a fast run, and where kernels are interpreted or
    emulated."""
    is_small = _is_slow(backend) or _fast(pytestconfig)
    return lambda full, small: small if is_small else full


@pytest.fixture(scope="session")
def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """The logits dtypes that `backend` serves; fewer, where it is slow."""
    if _is_slow(backend):
        return (torch.float32, torch.bfloat16)
    return named(backend).capabilities.logits_dtypes


@pytest.fixture(params=["direct", "dispatcher"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How an eager call reaches its kernel: by the shortest way, or as a torch operation (as
    subclasses, modes and traced graphs do)."""
    if request.param == "dispatcher":
        for name, module in list(sys.modules.items()):
            if name.startswith("papo_kernels.") and hasattr(module, "is_plain"):
                monkeypatch.setattr(module, "is_plain", lambda tensor: False)
    return str(request.param)


# ---- skips --------------------------------------------------------------------------------------


class Need(NamedTuple):
    met: Callable[[], bool]
    reason: str  # of a skip


def _has_cuda_kernels() -> bool:
    from papo_kernels.backends import extension

    return extension.has_cuda()


def _tool(name: str) -> Callable[[], bool]:
    """Whether one of CUDA's tools is there: beside nvcc, on PATH or in triton's package."""

    def found() -> bool:
        from benchmarks.issue_model.build import binary_tool

        return binary_tool(name) is not None

    return found


def _package(name: str) -> Callable[[], bool]:
    return lambda: importlib.util.find_spec(name) is not None


NEEDS = {
    "g++": Need(lambda: shutil.which("g++") is not None, "no g++"),
    "nvcc": Need(lambda: bool(os.environ.get("CUDACXX") or shutil.which("nvcc")), "no nvcc"),
    "cuobjdump": Need(_tool("cuobjdump"), "no cuobjdump, in triton's package or on PATH"),
    "nvdisasm": Need(_tool("nvdisasm"), "no nvdisasm, in triton's package or on PATH"),
    "xdist": Need(_package("xdist"), "no pytest-xdist"),
    "triton": Need(_package("triton"), "no triton"),
    "setuptools": Need(_package("setuptools"), "no setuptools"),
    "a GPU": Need(torch.cuda.is_available, "no CUDA device"),
    "two GPUs": Need(lambda: torch.cuda.device_count() > 1, "no second GPU"),
    "clusters": Need(
        lambda: torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0),
        "no thread block clusters",
    ),
    "CUDA kernels": Need(_has_cuda_kernels, "the extension was built without CUDA"),
    "the extension here": Need(
        lambda: bool(list((Path(__file__).parents[1] / "papo_kernels").glob("_C*.so"))),
        "the extension is elsewhere",
    ),
    "the interpreter": Need(lambda: INTERPRETED, "runs Triton's kernels on the CPU"),
    "no interpreter": Need(lambda: not INTERPRETED, "compiles kernels: not in an interpreted run"),
    **{p.name: Need(p.is_installed, f"no {p.name} {p.version}: `make peers`") for p in PEERS},
    **{f"{p.name}'s tests": Need(p.has_tests, f"no {p.name} tests: `make peers`") for p in PEERS},
}


@functools.cache
def _is_met(name: str) -> bool:
    return NEEDS[name].met()


def _why_not(item: pytest.Item) -> str | None:
    """Why this test is skipped, None if it runs."""
    names = [name for mark in item.iter_markers("needs") for name in mark.args]
    if item.get_closest_marker("gpu"):
        names.insert(0, "a GPU")
    for name in names:
        if not _is_met(name):
            return NEEDS[name].reason
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for mark in item.iter_markers("not_for"):
        if mark.kwargs.items() <= parameters.items():
            return str(mark.args[0])
    return None


@pytest.fixture(scope="session")
def cxx() -> list[str]:
    """The command of the system's C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return compiler.split()


@pytest.fixture
def kernels_run() -> Callable[[Callable[[], Any]], list[str]]:
    """``kernels_run(call)``: the names of the kernels that a call runs on the GPU."""

    def run(call: Callable[[], Any]) -> list[str]:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        names = [event.name for event in profiler.events() if event.device_type == on_gpu]
        if not names:
            pytest.skip("the profiler sees no kernels here")
        return names

    return run


# ---- which tests a run has ----------------------------------------------------------------------


def _fast(config: pytest.Config) -> bool:
    return bool(config.getoption("--fast"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Every test there starts ranks, and importing what they run takes seconds."""
    return True if _fast(config) and collection_path.name == "distributed" else None


def _left_out(item: pytest.Item) -> bool:
    """What needs more than Python, and what happens around a kernel, of a fast run; the latter, and
    tests of no backend, of a slow backend."""
    if _fast(item.config):
        return any(item.get_closest_marker(name) for name in ("gpu", "needs", "plumbing"))
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    if backend in EMULATED:
        # The fused head calls the kernels alike on every device: one is enough.
        again = backend != EMULATED[0] and item.path.name.startswith("test_head")
        return again or item.get_closest_marker("plumbing") is not None
    if not INTERPRETED or item.path.name.startswith("test_triton"):
        return False
    return backend is None or item.get_closest_marker("plumbing") is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked_for_large = "large" in (config.getoption("-m") or "")
    left_out = [
        item
        for item in items
        if _left_out(item) or (item.get_closest_marker("large") and not asked_for_large)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        if reason := _why_not(item):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """With ``--fast``, a test that is about to start a process is skipped there and then: what a
    fast run has needs no list."""
    if not _fast(item.config):
        return (yield)

    def starts(*args: object, **kwargs: object) -> NoReturn:
        pytest.skip("starts a process")

    with (
        mock.patch.object(subprocess.Popen, "__init__", starts),
        mock.patch.object(multiprocessing.process.BaseProcess, "start", starts),
    ):
        return (yield)
