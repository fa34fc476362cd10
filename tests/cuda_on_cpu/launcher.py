"""Runs CUDA C++ kernels on the CPU: compiled by g++ behind cuda_on_cpu.h, with the sanitizers where they are loaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
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

_FLAGS = ["-std=c++17", "-shared", "-fPIC", "-g1", "-O1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


@cache
def library(kernel: _cuda.Kernel, sources: Path) -> Any:
    """A kernel's launcher: ``f(sizes, shared, args, count, seed)``."""
    flags = [*_FLAGS, *(_SANITIZERS if SANITIZE else []), *(f"-D{key}={value}" for key, value in kernel.defines)]
    text = (
        f'#include "{_HERE / "cuda_on_cpu.h"}"\n#include "{sources / kernel.source}.cu"\n'
        'extern "C" int launch(const unsigned* sizes, size_t shared, void** args, int count, unsigned seed) {\n'
        f"    return cuda_on_cpu::launch({kernel.name}, sizes, shared, args, count, seed);\n}}\n"
    )
    digest = hashlib.sha256(repr((flags, text)).encode())
    for path in [_HERE / "cuda_on_cpu.h", *sorted(sources.iterdir())]:
        digest.update(path.read_bytes())
    path = BUILD / f"{kernel.source}-{kernel.name}-{digest.hexdigest()[:24]}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        command = ["g++", *flags, "-x", "c++", "-", "-o", str(partial)]
        done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{kernel.label} does not compile for the CPU:\n{done.stderr}")
        os.replace(partial, path)
    return ctypes.CDLL(str(path)).launch


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
        values = [a.tobytes() for a in args]
        buffers = [ctypes.create_string_buffer(v, len(v)) for v in values]
        pointers = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(b) for b in buffers))
        sizes = (ctypes.c_uint * 6)(*grid, *block)
        seed = len(self.launched)
        wrong = library(kernel, self.sources)(sizes, ctypes.c_size_t(shared), pointers, len(buffers), seed)
        assert wrong == -1, f"{kernel.label} takes {wrong} arguments, got {len(buffers)}"
