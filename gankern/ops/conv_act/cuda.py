"""Adapter of the CUDA C++ kernels in csrc/cuda/conv.cu, conv_few.cu and conv_weight_grad.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern import _cuda
from gankern._cuda import refuse
from gankern._native import ACTIVATIONS, acc_dtype
from gankern.ops.conv_act import gpu
from gankern.ops.conv_act.gpu import Finish, Problem, channels_last
from gankern.ops.conv_act.reference import ConvOptions, activate_backward

__all__ = [
    "KERNELS",
    "activate_backward",
    "channels_last",
    "conv",
    "conv_as_stock",
    "conv_input_grad",
    "conv_statistics",
    "conv_weight_grad",
    "refuse",
]

# As in csrc/cuda/matrix_tile.h and conv_few.cu.
_THREADS, _COLUMNS, _FEW = 128, 64, 4

_PRECISIONS = [*((dtype, False) for dtype in _cuda.TYPES), (torch.float32, True)]

#: Every specialisation that may be launched.
KERNELS = [
    *(
        _cuda.kernel("conv", "conv", dtype, TF32=tf32, WIDENS=widens)
        for dtype, tf32 in _PRECISIONS
        for widens in (False, True)
    ),
    *(_cuda.kernel("conv_few", "conv_few", dtype, WIDENS=widens) for dtype in _cuda.TYPES for widens in (False, True)),
    *(_cuda.kernel("conv_weight_grad", "conv_weight_grad", dtype, TF32=tf32) for dtype, tf32 in _PRECISIONS),
    *(_cuda.kernel("conv_weight_grad", "sum_parts", dtype, TF32=False) for dtype in _cuda.TYPES),
]


def _rows(dtype: torch.dtype) -> int:
    return 64 if dtype == torch.float64 else 128


def _depth(dtype: torch.dtype) -> int:
    return 64 // dtype.itemsize


def _is_packed(channels: int, *tensors: Tensor) -> bool:
    """Whether pixels begin at multiples of 16 bytes."""
    aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
    return aligned and channels * tensors[0].element_size() % 16 == 0


def _convolve(what: Problem, source: Tensor, weight: Tensor, result: Tensor, finish: Finish) -> Tensor | None:
    dtype, device, (*_, channels) = source.dtype, source.device, what.result
    phases, pixels = what.grid()
    packed_source = int(_is_packed(what.source[2], source, weight))
    tensors = (source, weight, result, finish.scale, finish.shift, finish.activated)
    options = (float(finish.negative_slope), ACTIVATIONS[finish.activation], packed_source)
    if channels <= _FEW and not finish.statistics:
        # So many threads to a pixel as read it at once.
        packs = -(-what.source[2] * source.element_size() // 16)
        lanes = min(32, 1 << (packs - 1).bit_length())
        kernel = _cuda.kernel("conv_few", "conv_few", dtype, WIDENS=what.widens)
        blocks = phases * -(-pixels * lanes // _THREADS)
        _cuda.launch(kernel, blocks, _THREADS, *tensors, *options, lanes, *what.numbers(), device=device)
        return None
    tiles = phases * -(-pixels // _rows(dtype))
    sums = torch.empty(tiles, 2, channels, dtype=torch.float64, device=device) if finish.statistics else None
    kernel = _cuda.kernel("conv", "conv", dtype, TF32=gpu.allows_tf32(dtype), WIDENS=what.widens)
    blocks = tiles * -(-channels // _COLUMNS)
    packed_result = int(_is_packed(channels, result, weight))
    arguments = (*tensors, sums, *options, packed_result, *what.numbers())
    _cuda.launch(kernel, blocks, _THREADS, *arguments, device=device)
    return sums


def _weight_grad(narrow: Tensor, wide: Tensor, grad_weight: Tensor, options: ConvOptions) -> None:
    (images, channels, *narrow_size), (_, wide_channels, *wide_size) = narrow.shape, wide.shape
    dtype, device, size = narrow.dtype, narrow.device, grad_weight.numel()
    pixels = images * narrow_size[0] * narrow_size[1]
    tiles = -(-channels // _rows(dtype)) * -(-size // channels // _COLUMNS)
    share, count = gpu.parts(pixels, tiles, _depth(dtype))
    parts = torch.empty(count, size, dtype=acc_dtype(dtype), device=device) if count > 1 else None
    kernel = _cuda.kernel("conv_weight_grad", "conv_weight_grad", dtype, TF32=gpu.allows_tf32(dtype))
    packed = int(_is_packed(channels, narrow)), int(_is_packed(wide_channels, wide))
    numbers = (images, *narrow_size, channels, *wide_size, wide_channels, *grad_weight.shape[2:])
    geometry = (*options.stride, *options.padding, *options.dilation)
    arguments = (narrow, wide, grad_weight, parts, share, *packed, *numbers, *geometry)
    _cuda.launch(kernel, (tiles, count), _THREADS, *arguments, device=device)
    if parts is not None:
        kernel = _cuda.kernel("conv_weight_grad", "sum_parts", dtype, TF32=False)
        _cuda.launch(kernel, -(-size // _THREADS), _THREADS, parts, grad_weight, count, size, device=device)


_kernels = gpu.Kernels(_convolve, _weight_grad)
conv = conv_as_stock = _kernels.conv
conv_statistics = _kernels.conv_statistics
conv_input_grad = _kernels.conv_input_grad
conv_weight_grad = _kernels.conv_weight_grad
