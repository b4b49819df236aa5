"""The backend that a kernel test runs on, and the only skips of the suite.

``backend`` is a test argument over what this process can run: reference and cpu; cuda and triton
where there is a CUDA device (marked ``gpu``, shown as skipped where there is none).
``--backends a,b`` overrides.

With ``TRITON_INTERPRET=1`` it is triton alone, interpreted at about 50 ms a row: fewer rows and
dtypes, and none of the tests that would only repeat what another backend has shown.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

try:
    import hypothesis
except ImportError:  # `make gpu-check` runs where there is no more than pytest
    hypothesis = None  # type: ignore[assignment]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU_BACKENDS = ("triton", "cuda")
T = TypeVar("T")

# The same examples in every run: a red test is the commit's doing. An interpreted kernel is slow.
if hypothesis is not None:
    examples = 2 if INTERPRETED else 30
    hypothesis.settings.register_profile(
        "papo", deadline=None, derandomize=True, database=None, max_examples=examples
    )
    hypothesis.settings.load_profile("papo")
collect_ignore = [] if hypothesis is not None else ["kernels/test_properties.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backends", help="comma-separated: reference, cpu, triton, cuda")


def _backends(config: pytest.Config) -> list[str]:
    asked = config.getoption("--backends")
    if asked:
        return [name.strip() for name in asked.split(",")]
    return ["triton"] if INTERPRETED else ["reference", "cpu", "triton", "cuda"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    params = [
        pytest.param(name, marks=[pytest.mark.gpu] if _runs_on_gpu(name) else [])
        for name in _backends(metafunc.config)
    ]
    # Session scope lets hypothesis tests take `backend` and `device`.
    metafunc.parametrize("backend", params, scope="session")


def _runs_on_gpu(backend: str) -> bool:
    return backend in GPU_BACKENDS and not INTERPRETED


@pytest.fixture(scope="session")
def device(backend: str) -> str:
    """Where the tensors of a test of `backend` live."""
    return "cuda" if _runs_on_gpu(backend) else "cpu"


@pytest.fixture(scope="session")
def sizes(backend: str) -> Callable[[T, T], T]:
    """``sizes(full, interpreted)``: the second where kernels are interpreted, and so slow."""
    return lambda full, interpreted: interpreted if INTERPRETED else full


@pytest.fixture(scope="session")
def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """The logits dtypes that `backend` serves; fewer, where it is interpreted."""
    if INTERPRETED:
        return (torch.float32, torch.bfloat16)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return narrow if backend in GPU_BACKENDS else (torch.float64, *narrow)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "plumbing: of torch around a kernel; not under the interpreter"
    )


@pytest.fixture(params=["direct", "dispatcher"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How an eager call reaches its kernel: by the shortest way, or as a torch operation (as
    subclasses, modes and traced graphs do)."""
    if request.param == "dispatcher":
        monkeypatch.setattr("papo_kernels.ops.is_plain", lambda tensor: False)
    return str(request.param)


@pytest.fixture(scope="session")
def cxx() -> list[str]:
    """The command of the system's C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return compiler.split()


def _why_no_gpu(item: pytest.Item) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "cuda":
        from papo_kernels.backends import extension as _native

        if not _native.has_cuda():
            return "the extension was built without CUDA"
    return None


def _shown_elsewhere(item: pytest.Item) -> bool:
    """Tests of no backend, and of what happens around a kernel."""
    if item.path.name.startswith("test_triton"):
        return False
    return "backend" not in getattr(item, "fixturenames", ()) or bool(
        item.get_closest_marker("plumbing")
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "large" not in (config.getoption("-m") or ""):
        large = [item for item in items if item.get_closest_marker("large")]
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if item not in large]
    if INTERPRETED:
        repeats = [item for item in items if _shown_elsewhere(item)]
        config.hook.pytest_deselected(items=repeats)
        items[:] = [item for item in items if item not in repeats]
    for item in items:
        if item.get_closest_marker("gpu") and (reason := _why_no_gpu(item)):
            item.add_marker(pytest.mark.skip(reason=reason))
