"""CUDA C++ kernels: compiled at run time by NVRTC through CuPy, cached on disk, launched on torch's current stream."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gankern import backends

_HERE = Path(__file__).parent
#: Beside the package where it was installed, in the source tree otherwise.
SOURCES = next((p for p in (_HERE / "cuda_sources", _HERE.parent / "csrc" / "cuda") if p.is_dir()), _HERE)

# Bytes of dynamic shared memory that a block gets without asking.
_SHARED_BY_DEFAULT = 48 * 1024

#: Names of the storage types in csrc/cuda/device.h.
TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "half"}


class Kernel(NamedTuple):
    """One entry point of one source file, specialised by macros."""

    source: str
    name: str
    defines: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        return " ".join([self.source, self.name, *(f"{key}={value}" for key, value in self.defines)])


def kernel(source: str, name: str, dtype: torch.dtype, **defines: Any) -> Kernel:
    """The entry point `name` of csrc/cuda/`source`.cu for a storage type and the values of its other macros."""
    macros = {"STORAGE": TYPES[dtype], **{key: str(int(v) if isinstance(v, bool) else v) for key, v in defines.items()}}
    return Kernel(source, name, tuple(macros.items()))


@cache
def missing() -> str | None:
    """Why kernels cannot be compiled and launched here, whatever the tensors; None if they can."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        return f"needs CuPy and NVRTC (pip install '.[cuda13]' or '.[cuda12]' in a clone of gankern): {error}"
    return None


def refuse(*tensors: Tensor) -> str | None:
    """Why the CUDA C++ kernels cannot run on these tensors; None if they can."""
    devices = ("cuda",) if launcher is _launch else ("cuda", "cpu")
    for tensor in tensors:
        if tensor.device.type not in devices:
            return f"needs tensors on a CUDA device; got {tensor.device}"
        if tensor.dtype not in TYPES:
            return f"needs float32, float64, bfloat16 or float16; got {tensor.dtype}"
    if launcher is not _launch:
        return None
    if not tensors and not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU; this torch is built for ROCm"
    return missing() or next((why for t in tensors if (why := _unknown(t.get_device()))), None)


@cache
def _unknown(device: int) -> str | None:
    """Why NVRTC cannot compile for a GPU: it is older or younger than the GPUs that NVRTC knows."""
    from cupy_backends.cuda.libs import nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    known = nvrtc.getSupportedArchs()
    if 10 * major + minor in known:
        return None
    release = ".".join(map(str, nvrtc.getVersion()))
    return f"NVRTC {release} compiles for sm_{min(known)} to sm_{max(known)}; got a GPU of sm_{major}{minor}"


def adapter(module: str) -> backends.Later:
    """A room's adapter of these kernels, imported when a tensor is there that it may run on."""
    return backends.Later(module, refuse)


def cache_dir() -> Path:
    """Where compiled kernels are kept: ``GANKERN_CACHE_DIR``, or ``gankern`` in the user's cache."""
    given = os.environ.get("GANKERN_CACHE_DIR")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gankern"


def compile_kernel(wanted: Kernel, arch: str, verbose: bool = False) -> tuple[bytes, str]:
    """Machine code for an architecture such as ``sm_90``, and the compiler's log; not from the cache.

    Raises
    ------
    RuntimeError
        With the compiler's log, where the source does not compile.
    """
    return _compiled(wanted, arch, "getCUBIN", ["--ptxas-options=-v"] if verbose else [])


def ptx(wanted: Kernel, arch: str) -> str:
    """A kernel in PTX, for an architecture such as ``compute_90``; for tests."""
    code, _ = _compiled(wanted, arch, "getPTX")
    return code.decode() if isinstance(code, bytes) else code


def _compiled(wanted: Kernel, arch: str, read: str, more: Sequence[str] = ()) -> tuple[Any, str]:
    from cupy_backends.cuda.libs import nvrtc

    source, headers = _texts(wanted.source)
    options = (*_options(wanted, arch), *more)
    program = nvrtc.createProgram(
        source.decode(), f"{wanted.source}.cu", list(headers.values()), [name.encode() for name in headers]
    )
    try:
        nvrtc.compileProgram(program, options)
        return getattr(nvrtc, read)(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"NVRTC cannot compile {wanted.label} for {arch}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def _options(wanted: Kernel, arch: str) -> tuple[str, ...]:
    # By default NVRTC 13.0 takes a generic lambda for a function of the host.
    defines = (f"-D{key}={value}" for key, value in wanted.defines)
    return ("-std=c++17", "-default-device", f"--gpu-architecture={arch}", *defines)


def _texts(source: str) -> tuple[bytes, dict[str, bytes]]:
    headers = {path.name: path.read_bytes() for path in sorted(SOURCES.glob("*.h"))}
    return (SOURCES / f"{source}.cu").read_bytes(), headers


def cubin(wanted: Kernel, arch: str) -> bytes:
    """Machine code of a kernel, from the cache on disk where it is there."""
    from cupy_backends.cuda.libs import nvrtc

    source, headers = _texts(wanted.source)
    digest = hashlib.sha256()
    for part in (repr((nvrtc.getVersion(), _options(wanted, arch))).encode(), source, *headers.values()):
        digest.update(len(part).to_bytes(8, "little") + part)
    path = cache_dir() / f"{wanted.source}-{wanted.name}-{arch}-{digest.hexdigest()[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code, _ = compile_kernel(wanted, arch)
    try:
        write_whole(path, code)
    except OSError:
        backends.logger.warning("compiled kernels cannot be kept in %s", path.parent)
    return code


def write_whole(path: Path, code: bytes) -> None:
    """Whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@cache
def _function(wanted: Kernel, device: int) -> Any:
    from cupy.cuda.function import Module

    major, minor = torch.cuda.get_device_capability(device)
    module = Module()
    module.load(cubin(wanted, f"sm_{major}{minor}"))
    return module.get_function(wanted.name)


def _launch(
    wanted: Kernel, grid: Sequence[int], block: Sequence[int], args: list[Any], shared: int, device: torch.device
) -> None:
    stream = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        function = _function(wanted, stream.device_index)
        if shared > _SHARED_BY_DEFAULT:
            _allow_shared(function, shared)
        # CuPy raises where the launch fails.
        function(tuple(grid), tuple(block), tuple(args), shared, _stream(stream.cuda_stream))


class _Address(NamedTuple):
    """A stream by CUDA's stream protocol."""

    address: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


@cache
def _stream(address: int) -> Any:
    """CuPy's object of a stream of torch's."""
    import cupy

    # CuPy 13 has no other way; CuPy 14 warns of it.
    external = getattr(cupy.cuda.Stream, "from_external", None)
    return cupy.cuda.ExternalStream(address) if external is None else external(_Address(address))


def _allow_shared(function: Any, size: int) -> None:
    """Let a kernel's blocks have more dynamic shared memory than they have by default."""
    from cupy_backends.cuda.api import driver

    driver.funcSetAttribute(function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, size)


#: What starts a kernel; tests put in its place one that records the call or runs it on the CPU.
launcher = _launch


def launch(
    wanted: Kernel,
    grid: int | Sequence[int],
    block: int,
    *args: Tensor | float | np.ndarray | None,
    device: torch.device,
    shared: int = 0,
) -> None:
    """Start a kernel on torch's current stream of the device; nothing where the grid is empty.

    Tensors reach it as pointers and None as a null pointer, integers as ``long long``, floats as ``double``, numpy's
    record of shape () as a struct.
    """
    blocks = (grid,) if isinstance(grid, int) else tuple(grid)
    if 0 in blocks:
        return
    launcher(wanted, (*blocks, 1, 1)[:3], (block, 1, 1), [_argument(a) for a in args], shared, device)


def _argument(value: Tensor | float | np.ndarray | None) -> Any:
    if isinstance(value, np.ndarray):
        return value
    if value is None:
        return np.uintp(0)
    if isinstance(value, Tensor):
        return np.uintp(value.data_ptr())
    return np.float64(value) if isinstance(value, float) else np.int64(value)


def packed(size: int, *tensors: Tensor | None) -> bool:
    """Whether kernels may read and write dense tensors' runs of so many values 16 bytes at a time."""
    given = [t for t in tensors if t is not None]
    return size * given[0].element_size() % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in given)
