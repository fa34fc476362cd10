"""Memory of intermediates on the CPU, kept from one step to the next.

Freshly allocated memory costs a page fault every 4 KiB when it is first touched, which for tensors of many megabytes is
as much as the arithmetic on them. Intermediates of gankern's operations lie in blocks that a later call takes again.
A block belongs to one tensor at a time, for as long as anything refers to it. Threads, several models and forked
processes may use it at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gankern._native import kernels

__all__ = ["empty", "empty_like", "idle_bytes", "limit", "release", "set_limit", "used_bytes"]

# Below, malloc keeps memory by itself.
SMALLEST = 1 << 14


def set_limit(size: int) -> None:
    """Let at most so much memory lie idle.

    Parameters
    ----------
    size : int
        Bytes; 0 gives all memory back as soon as it is free. Before the first call it is the environment variable
        ``GANKERN_WORKSPACE_LIMIT``, or 1 GiB.

    Raises
    ------
    TypeError, ValueError
        If `size` is no integer or negative.
    """
    global _limit
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size must be an int; got {type(size).__name__}")
    if size < 0:
        raise ValueError(f"size must be at least 0; got {size}")
    _limit = size
    if kernels is not None:
        kernels.workspace_limit(size)


def limit() -> int:
    """Memory that may lie idle, in bytes."""
    return _limit


def release() -> None:
    """Give all idle memory back to the system."""
    if kernels is not None:
        kernels.workspace_limit(0)
        kernels.workspace_limit(_limit)


def used_bytes() -> int:
    """Memory that tensors lie in, in bytes."""
    return 0 if kernels is None else kernels.workspace_bytes()[0]


def idle_bytes() -> int:
    """Memory kept for later calls, in bytes."""
    return 0 if kernels is None else kernels.workspace_bytes()[1]


def empty(
    shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """:func:`torch.empty` on the CPU; large ones in the workspace."""
    if kernels is None or math.prod(shape) * dtype.itemsize < SMALLEST:
        return torch.empty(shape, dtype=dtype, memory_format=memory_format)
    strides, size = [0] * len(shape), 1
    order = (1, 3, 2, 0) if memory_format == torch.channels_last else range(len(shape) - 1, -1, -1)
    for d in order:
        strides[d] = size
        size *= shape[d]
    return _empty(shape, strides, dtype, size)


def empty_like(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """:func:`empty` of a tensor's shape and dtype."""
    return empty(tensor.shape, tensor.dtype, memory_format)


def like(tensor: Tensor) -> Tensor:
    """Room for the values of a tensor that is dense in some order: of the same shape, dtype and strides."""
    if kernels is None or tensor.numel() * tensor.element_size() < SMALLEST:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return _empty(tensor.shape, tensor.stride(), tensor.dtype, tensor.numel())


def place(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Callable[[], Tensor]:
    """A function that finds room for a dense tensor each time."""
    return partial(_empty, tuple(shape), tuple(strides), dtype, math.prod(shape))


def _empty(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, numel: int) -> Tensor:
    values = torch.frombuffer(kernels.Lease(numel * dtype.itemsize), dtype=dtype)
    # Not a view of those, which could not be changed in place as a result of an autograd Function.
    return torch.empty(0, dtype=dtype).set_(values.untyped_storage(), 0, shape, strides)


_limit = 1 << 30
if (_given := os.environ.get("GANKERN_WORKSPACE_LIMIT")) is not None:
    if not _given.isdecimal():
        raise ValueError(f"GANKERN_WORKSPACE_LIMIT must be a number of bytes; got {_given!r}")
    set_limit(int(_given))
