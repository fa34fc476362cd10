"""Adapter of the CUDA C++ kernels in csrc/cuda/minibatch_discrimination.cu and l1_distance.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern import _cuda
from gankern._cuda import refuse
from gankern._native import acc_dtype
from gankern.ops.minibatch_discrimination.parts import add_up, cut, scratch

__all__ = [
    "KERNELS",
    "distance",
    "distance_backward",
    "distance_tangent",
    "features",
    "features_backward",
    "features_double_backward",
    "refuse",
]

_WARP = 32
_BLOCKS = 264  # two for each multiprocessor of an H100

_FEATURES_BLOCK = 128
_FEATURES_LEAST = 64  # samples of a part
_PASSES = ("features", "features_backward", "features_double_backward")
# Kernel dims in registers, and whether they are all.
_DIMS = ((5, True), (8, True), (16, True), (16, False))


def _features_kernel(order: int, dtype: torch.dtype, dims: int, whole: bool) -> tuple[_cuda.Kernel, int]:
    """The kernel and the samples of a thread: as many as fit into its registers."""
    size = dims * acc_dtype(dtype).itemsize
    rows = 2 if size <= (32 if order == 2 else 64) else 1
    name = _PASSES[order]
    return _cuda.kernel("minibatch_discrimination", name, dtype, PASS=order, DIMS=dims, ROWS=rows, WHOLE=whole), rows


def _run_features(order: int, inputs: list[Tensor], outputs: list[Tensor], *numbers: float) -> None:
    m = inputs[-1]
    n, b, c = m.shape
    dims, whole = next((d, w) for d, w in _DIMS if c <= d or not w)
    kernel, rows = _features_kernel(order, m.dtype, dims, whole)
    blocks = -(-n // (rows * _WARP)) * b
    count, size = cut(n, blocks, _BLOCKS, _FEATURES_LEAST)
    parts = [scratch(output, count) for output in outputs]
    chunks = 1 if whole or order == 0 else -(-c // dims)
    arguments: list[Any] = [*inputs, *(t for pair in zip(outputs, parts, strict=True) for t in pair)]
    _cuda.launch(
        kernel, blocks * count * chunks, _FEATURES_BLOCK, *arguments, n, b, c, count, size, *numbers, device=m.device
    )
    for output, part in zip(outputs, parts, strict=True):
        add_up(output, part)


def features(m: Tensor, include_self: bool) -> Tensor:
    output = torch.empty(m.shape[:2], dtype=m.dtype, device=m.device)
    if output.numel():
        _run_features(0, [m.contiguous()], [output], float(include_self))
    return output


def features_backward(grad_output: Tensor, m: Tensor) -> Tensor:
    grad_m = torch.empty(m.shape, dtype=m.dtype, device=m.device)
    if m.numel():
        _run_features(1, [grad_output.contiguous(), m.contiguous()], [grad_m])
    return grad_m


def features_double_backward(cotangent: Tensor, grad_output: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    grad_grad_output, grad_m = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (grad_output, m))
    if grad_output.numel():
        inputs = [t.contiguous() for t in (cotangent, grad_output, m)]
        _run_features(2, inputs, [grad_grad_output, grad_m])
    return grad_grad_output, grad_m


_DISTANCE_BLOCK = 256
_DISTANCE_FEATURES, _DISTANCE_ROWS, _DISTANCE_COLUMNS = 16, 16, 32  # of a tile
_BACKWARD_LEAST = 16  # samples of a part
_BACKWARD_ROWS = 64  # of a block whose warps all have the same kernel dims


def _distance_kernel(order: int, dtype: torch.dtype) -> _cuda.Kernel:
    name = ("distance", "distance_tangent", "distance_backward")[order]
    return _cuda.kernel("l1_distance", name, dtype, PASS=order)


def _pairs(order: int, *inputs: Tensor) -> Tensor:
    m = inputs[-1]
    n, b, c = m.shape
    output = torch.empty((n, n, b), dtype=m.dtype, device=m.device)
    tiles = -(-n // _DISTANCE_ROWS) * -(-n // _DISTANCE_COLUMNS) * -(-b // _DISTANCE_FEATURES)
    tensors = [*(t.contiguous() for t in inputs), output]
    _cuda.launch(_distance_kernel(order, m.dtype), tiles, _DISTANCE_BLOCK, *tensors, n, b, c, device=m.device)
    return output


def distance(m: Tensor) -> Tensor:
    return _pairs(0, m)


def distance_tangent(tangent: Tensor, m: Tensor) -> Tensor:
    return _pairs(1, tangent, m)


def distance_backward(grad_output: Tensor, m: Tensor) -> Tensor:
    grad_m = torch.empty(m.shape, dtype=m.dtype, device=m.device)
    if not m.numel():
        return grad_m
    n, b, c = m.shape
    dims = 32 // acc_dtype(m.dtype).itemsize
    groups = next((g for g in (1, 2) if c <= g * dims), 4)
    chunks = -(-c // (groups * dims))
    blocks = -(-n // (_BACKWARD_ROWS // groups)) * -(-b // _DISTANCE_FEATURES) * chunks
    count, size = cut(n, blocks, _BLOCKS, _BACKWARD_LEAST)
    parts = scratch(grad_m, count)
    _cuda.launch(
        _distance_kernel(2, m.dtype),
        blocks * count,
        _DISTANCE_BLOCK,
        grad_output.contiguous(),
        m.contiguous(),
        grad_m,
        parts,
        n,
        b,
        c,
        size,
        groups,
        chunks,
        device=m.device,
    )
    add_up(grad_m, parts)
    return grad_m


#: Every specialisation that may be launched.
KERNELS = [
    *(
        _features_kernel(order, dtype, dims, whole)[0]
        for dtype in _cuda.TYPES
        for order in range(3)
        for dims, whole in _DIMS
    ),
    *(_distance_kernel(order, dtype) for dtype in _cuda.TYPES for order in range(3)),
]
