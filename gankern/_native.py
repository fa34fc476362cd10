"""The compiled CPU kernels: imported once, the reason kept where that fails."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# torch has been imported: its OpenMP runtime is the one whose threads the kernels use.
kernels: Any = None
import_error: str | None = None
try:
    kernels = importlib.import_module("gankern._C")
except ImportError as error:
    import_error = f"the compiled kernels do not import: {error}"

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
# A kernel reads them in 10 microseconds; threads take as long to start.
_FEW_ELEMENTS = 1 << 15
ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2, "tanh": 3}


def refuse(*tensors: Tensor) -> str | None:
    """Why the CPU kernels cannot run on these tensors; None if they can."""
    if import_error is not None:
        return import_error
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"needs tensors on the CPU; got {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"needs float32, float64 or bfloat16; got {tensor.dtype}"
    return None


def span(name: str) -> AbstractContextManager[Any]:
    """Shows a kernel in torch's profiler, where one is on."""
    return torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else nullcontext()


def threads(elements: int) -> int:
    """Threads for a kernel that reads so many elements: one where it is done before others have started."""
    return torch.get_num_threads() if elements >= _FEW_ELEMENTS else 1


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type that arithmetic on a storage type is done in: float32 for the half types."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def address(tensor: Tensor | None) -> int:
    """Address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
