"""Builds papo_kernels._C by running CMake; CMakeLists.txt lists what is compiled.

Environment: PAPO_CUDA=auto|on|off (auto: where nvcc is found), CMAKE_ARGS for anything else,
MAX_JOBS for the number of parallel compilers.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("PAPO_CUDA", "auto")
        if cuda not in ("auto", "on", "off"):
            raise ValueError(f"PAPO_CUDA={cuda!r}: expected auto, on or off")
        # In an editable install this is papo_kernels/ in the source tree.
        target_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            f"-DPAPO_CUDA={cuda}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target_dir}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        # pip builds in a throwaway environment, whose cmake and ninja paths must not be cached.
        subprocess.run([*configure, "--fresh"], check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build_dir), "--parallel", jobs], check=True)


setup(
    ext_modules=[Extension("papo_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
