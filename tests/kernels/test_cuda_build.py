"""The CUDA kernels of the compiled extension: all of them are there for every architecture that is
shipped, and none spills. Needs no GPU. `python -m benchmarks.machine_code` checks the rest of the
machine code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.issue_model.build import ROOT
from benchmarks.machine_code.cuda_kernels import ARCHITECTURES, kernel_name, resource_usage
from papo_kernels.backends import extension

needs_machine_code = pytest.mark.needs("CUDA kernels", "cuobjdump")
INSTANCES = {"resident": 10, "stats": 6, "streamed": 5, "gradient": 5, "outputs": 1, "scale": 3}


@pytest.fixture(scope="module")
def usage():
    """(kernel, architecture, bytes of stack) of all that was compiled."""
    found = resource_usage(Path(extension.module().__file__))
    return [(kernel_name(symbol), architecture, stack) for symbol, architecture, _, stack in found]


def test_every_source_is_in_the_build():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    listed = re.search(r"set\(PAPO_CUDA_SOURCES(.*?)\)", cmake, re.DOTALL)
    assert listed
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    assert sorted(listed[1].split()) == [f"csrc/cuda/{s.name}" for s in sources]


@needs_machine_code
def test_every_kernel_for_every_architecture(usage):
    assert {architecture for _, architecture, _ in usage} == set(ARCHITECTURES)
    for architecture in ARCHITECTURES:
        here = [name for name, at, _ in usage if at == architecture]
        assert {name: here.count(name) for name in set(here)} == INSTANCES


@needs_machine_code
def test_no_spills_and_no_stack(usage):
    """Spilled registers lie on the stack."""
    assert [kernel for kernel in usage if kernel[2]] == []
