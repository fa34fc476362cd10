"""Builds gankern._C with CMake; needs a C++17 compiler, and from the build environment CMake, Ninja and pybind11."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


class CMakeExtension(Extension):
    def __init__(self, name: str, source: str = ".") -> None:
        super().__init__(name, sources=[])
        self.source = str(Path(source).resolve())


class CMakeBuild(build_ext):
    def build_extension(self, ext: CMakeExtension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Not build_temp, which editable installs throw away: kept, so that a rebuild compiles only what changed.
        build = Path(ext.source) / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            "cmake",
            "-S",
            ext.source,
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # An isolated build has its own Ninja, gone by the next build: never the path that CMake cached.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


class WithCudaSources(build_py):
    """CUDA C++ is compiled where it runs: its sources are part of the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("csrc/cuda", Path(self.build_lib) / "gankern" / "cuda_sources", dirs_exist_ok=True)


setup(
    ext_modules=[CMakeExtension("gankern._C")],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithCudaSources},
)
