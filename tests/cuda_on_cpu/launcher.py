"""Runs CUDA C++ kernels on the CPU: compiled by g++ behind cuda_on_cpu.h, with the sanitizers where they are loaded."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import struct
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gankern import _cuda

_HERE = Path(__file__).parent
BUILD = _HERE.parents[1] / "build" / "cuda_on_cpu"
#: Set where libasan is preloaded: kernels are then checked for reads and writes outside of their arrays.
SANITIZE = "libasan" in os.environ.get("LD_PRELOAD", "")

_FLAGS = ["-std=c++17", "-shared", "-fPIC", "-g1", "-O0", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def _built(name: str, text: str, *defines: str) -> Path:
    """A shared library of the text, made once for what it is made of."""
    flags = [*_FLAGS, *(_SANITIZERS if SANITIZE else []), *defines]
    path = BUILD / f"{name}-{hashlib.sha256(repr((flags, text)).encode()).hexdigest()[:24]}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        # Another process may be at it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(".partial")
            command = ["g++", *flags, "-x", "c++", "-", "-o", str(partial)]
            # The compiler itself takes half the time without the sanitizers' memory.
            plain = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
            done = subprocess.run(command, input=text, text=True, capture_output=True, env=plain, check=False)
            if done.returncode:
                raise RuntimeError(f"{name} {' '.join(defines)} does not compile for the CPU:\n{done.stderr}")
            os.replace(partial, path)
    return path


def _include(*paths: Path) -> str:
    """Includes of files, with what they and the files beside them hold, for :func:`_built`."""
    folders = {path.parent for path in paths}
    held = hashlib.sha256()
    for file in sorted(p for folder in folders for p in folder.iterdir() if p.suffix in {".h", ".cpp", ".cu"}):
        held.update(file.read_bytes())
    return f"// {held.hexdigest()}\n" + "".join(f'#include "{path}"\n' for path in paths)


@cache
def _load_runtime() -> None:
    """What all kernels call, found by them because it is loaded globally."""
    ctypes.CDLL(str(_built("runtime", _include(_HERE / "runtime.cpp"))), mode=ctypes.RTLD_GLOBAL)


@cache
def library(kernel: _cuda.Kernel, sources: Path) -> Any:
    """A kernel's launcher: ``f(sizes, shared, args, count, seed)``."""
    _load_runtime()
    text = _include(_HERE / "cuda_on_cpu.h", sources / f"{kernel.source}.cu") + (
        'extern "C" int launch(const unsigned* sizes, size_t shared, void** args, int count, unsigned seed) {\n'
        f"    return cuda_on_cpu::launch({kernel.name}, sizes, shared, args, count, seed);\n}}\n"
    )
    defines = [f"-D{key}={value}" for key, value in kernel.defines]
    return ctypes.CDLL(str(_built(f"{kernel.source}-{kernel.name}", text, *defines))).launch


class Launcher:
    """Stands in for :data:`gankern._cuda.launcher`; keeps what was launched.

    Parameters
    ----------
    sources : Path, optional
        Folder of the sources; a test with a planted bug gives one of its own.
    """

    def __init__(self, sources: Path = _cuda.SOURCES) -> None:
        self.sources = sources
        self.launched: list[tuple[_cuda.Kernel, tuple[int, ...], tuple[int, ...], int]] = []

    def __call__(
        self,
        kernel: _cuda.Kernel,
        grid: Sequence[int],
        block: Sequence[int],
        args: list[Any],
        shared: int,
        device: torch.device,
    ) -> None:
        assert device.type == "cpu", device
        self.launched.append((kernel, tuple(grid), tuple(block), shared))
        values = [a if isinstance(a, bytes) else struct.pack("d" if isinstance(a, float) else "q", a) for a in args]
        buffers = [ctypes.create_string_buffer(v, len(v)) for v in values]
        pointers = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(b) for b in buffers))
        sizes = (ctypes.c_uint * 6)(*grid, *block)
        seed = len(self.launched)
        wrong = library(kernel, self.sources)(sizes, ctypes.c_size_t(shared), pointers, len(buffers), seed)
        assert wrong == -1, f"{kernel.label} takes {wrong} arguments, got {len(buffers)}"
