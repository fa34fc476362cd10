"""CUDA C++ kernels: compiled at run time by NVRTC through CuPy, cached on disk, launched on torch's current stream."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@cache
def kernel(source: str, name: str, dtype: torch.dtype, **defines: Any) -> Kernel:
    """The entry point `name` of csrc/cuda/`source`.cu for a storage type and the values of its other macros."""
    macros = {"STORAGE": TYPES[dtype], **{key: str(int(v) if isinstance(v, bool) else v) for key, v in defines.items()}}
    return Kernel(source, name, tuple(macros.items()))


@contextmanager
def loading() -> Iterator[None]:
    """Let this thread load kernels in a ``with`` block also while a CUDA graph is captured, which CUDA else forbids."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        # It holds the mode that was before.
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


# CU_STREAM_CAPTURE_MODE_RELAXED
_RELAXED = 2


@cache
def missing() -> str | None:
    """Why kernels cannot be compiled and launched here, whatever the tensors; None if they can."""
    try:
        with loading():
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


class _Function:
    """A kernel on one GPU."""

    def __init__(self, wanted: Kernel, device: int) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        code = cubin(wanted, f"sm_{major}{minor}")
        with loading():
            module = _driver().moduleLoadData(code)
        self.address: int = _driver().moduleGetFunction(module, wanted.name)
        # Of arguments, the same at each launch but for a struct's.
        self._layout: struct.Struct | None = None
        # Memory that arguments lie in until they are launched; each launch takes one out, whatever thread it is in.
        self._rooms: list[_Room] = []

    def packed(self, arguments: Sequence[Any]) -> _Room:
        """A room with the arguments in it, to be given back."""
        if self._layout is None:
            self._layout = struct.Struct("=" + "".join(map(_format, arguments)))
        room = self._rooms.pop() if self._rooms else _Room(self._layout, arguments)
        self._layout.pack_into(room.values, 0, *arguments)
        return room

    def give_back(self, room: _Room) -> None:
        self._rooms.append(room)


def _format(argument: Any) -> str:
    if isinstance(argument, bytes):
        return f"{len(argument)}s"
    return "d" if isinstance(argument, float) else "q"


class _Room:
    """Memory for the arguments of a launch, and their addresses as CUDA's driver takes them."""

    def __init__(self, layout: struct.Struct, arguments: Sequence[Any]) -> None:
        self.values = ctypes.create_string_buffer(layout.size)
        sizes = [struct.calcsize("=" + _format(a)) for a in arguments]
        first = ctypes.addressof(self.values)
        places = itertools.accumulate(sizes[:-1], initial=first) if sizes else ()
        self._pointers = (ctypes.c_void_p * max(1, len(sizes)))(*places)
        self.address = ctypes.addressof(self._pointers)


_function = cache(_Function)


@cache
def _driver() -> Any:
    from cupy_backends.cuda.api import driver

    return driver


def _launch(
    wanted: Kernel, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared: int, device: torch.device
) -> None:
    current = torch.cuda.current_device()
    index = current if device.index is None else device.index
    if index != current:
        with torch.cuda.device(index):
            _launch(wanted, grid, block, args, shared, device)
        return
    driver = _driver()
    # In a thread that has done nothing on the GPU yet.
    if not driver.ctxGetCurrent():
        _make_current(index)
    function = _function(wanted, index)
    if shared > _SHARED_BY_DEFAULT:
        _allow_shared(function, shared)
    room = function.packed(args)
    # CuPy raises where the launch fails; the driver has copied the arguments when it returns.
    driver.launchKernel(
        function.address, *grid, *block, shared, torch._C._cuda_getCurrentRawStream(index), room.address, 0
    )
    function.give_back(room)


def _make_current(device: int) -> None:
    """Give the thread a device's context, as a call of CUDA's runtime does."""
    from cupy_backends.cuda.api import runtime

    runtime.setDevice(device)
    runtime.memGetInfo()


def _allow_shared(function: _Function, size: int) -> None:
    """Let a kernel's blocks have more dynamic shared memory than they have by default."""
    driver = _driver()
    driver.funcSetAttribute(function.address, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, size)


#: What starts a kernel; tests put in its place one that records the call or runs it on the CPU. It gets pointers and
#: integers as int, ``double`` as float and structs as bytes.
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
    blocks = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
    if 0 in blocks:
        return
    values = [a if type(a) in _NUMBERS else _argument(a) for a in args]
    launcher(wanted, blocks, (block, 1, 1), values, shared, device)


_NUMBERS = frozenset((int, float))


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    return value.tobytes() if isinstance(value, np.ndarray) else value


def packed(size: int, *tensors: Tensor | None) -> bool:
    """Whether kernels may read and write dense tensors' runs of so many values 16 bytes at a time."""
    given = [t for t in tensors if t is not None]
    return size * given[0].element_size() % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in given)
