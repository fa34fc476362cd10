"""Triton kernels: what they need, and stand-ins for where triton is not installed."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gankern import _cuda, backends
from gankern.arguments import install_hint

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, where tensors on the CPU will do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def missing() -> str | None:
    """Why kernels cannot run here, whatever the tensors; None if they can."""
    return None if find_spec("triton") is not None else f"needs triton ({install_hint('triton')})"


def refuse(*tensors: Tensor) -> str | None:
    """Why the Triton kernels cannot run on these tensors; None if they can.

    In Triton's interpreter, which is for tests, they run on the CPU where they are asked for by name.
    """
    devices = ("cuda", "cpu") if interprets() and backends.requested() == "triton" else ("cuda",)
    for tensor in tensors:
        if tensor.device.type not in devices:
            return f"needs tensors on a CUDA device; got {tensor.device}"
        if tensor.dtype not in TYPES:
            return f"needs float32, float64, bfloat16 or float16; got {tensor.dtype}"
    if not tensors and "cpu" not in devices and not torch.cuda.is_available():
        return "torch finds no GPU"
    return missing()


def adapter(module: str) -> backends.Later:
    """A room's adapter of these kernels, imported when a tensor is there that it may run on."""
    return backends.Later(module, refuse)


class Compiled(NamedTuple):
    """One specialisation of a kernel, as it is compiled ahead of time."""

    kernel: Any
    signature: dict[str, str]  # Triton's names of the arguments' types; "T*" is a pointer to the storage type
    constants: dict[str, Any]
    dtype: torch.dtype
    options: Mapping[str, int] = MappingProxyType({})
    divisible: tuple[str, ...] = ()  # arguments that are multiples of 16, or pointers to such addresses

    @property
    def label(self) -> str:
        values = {"T": str(self.dtype).removeprefix("torch."), **self.constants, **self.options}
        words = [self.kernel.__name__, *(f"{key}={value}" for key, value in values.items())]
        return " ".join(words + [f"16|{name}" for name in self.divisible])


def compiled(kernel: Any, signature: dict[str, str], dtype: torch.dtype, **constants: Any) -> Compiled:
    """A specialisation by the keywords that the kernel is started with: its constants and Triton's own options."""
    names = kernel.arg_names
    options = {k: v for k, v in constants.items() if k not in names}
    return Compiled(kernel, signature, {k: v for k, v in constants.items() if k in names}, dtype, options)


def types(dtype: torch.dtype) -> dict[str, Any]:
    """The constants T and A of a kernel: Triton's types that values are stored in and that arithmetic is done in."""
    import triton.language as tl

    stored = {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[dtype]
    return {"T": stored, "A": tl.float64 if dtype == torch.float64 else tl.float32}


def compile_kernel(wanted: Compiled, target: Any) -> Any:
    """Compile for a ``GPUTarget`` that need not be there."""
    import triton
    from triton.compiler import ASTSource

    names = types(wanted.dtype)
    constants = {k: v for k, v in {**names, **wanted.constants}.items() if k in wanted.kernel.arg_names}
    of = {"T": str(names["T"]), "A": str(names["A"])}
    signature = {k: _pointed(v, of) for k, v in wanted.signature.items()} | dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in wanted.kernel.arg_names}
    attributes = {(wanted.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in wanted.divisible}
    source = ASTSource(fn=wanted.kernel, signature=ordered, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=dict(wanted.options))


def _pointed(kind: str, names: dict[str, str]) -> str:
    # "A*" is a pointer to what arithmetic is done in.
    return "*" + names[kind[:-1]] if kind.endswith("*") else kind


def start(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **constants: Any) -> None:
    """Start a kernel on torch's current stream of the device; nothing where the grid is empty."""
    if 0 in grid:
        return
    if device.type != "cuda":
        kernel[grid](*args, **constants)
        return
    # Triton launches on the current device, whatever its arguments', and loads a kernel with its first launch.
    with torch.cuda.device(device), _loading() if torch.cuda.is_current_stream_capturing() else nullcontext():
        kernel[grid](*args, **constants)


def _loading() -> AbstractContextManager[None]:
    return nullcontext() if torch.version.hip is not None else _cuda.loading()


def bits(value: float) -> int:
    """A number's float64 as an integer, since Triton would round it to float32; the kernel casts it back."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
