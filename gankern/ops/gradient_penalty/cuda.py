"""Adapter of the CUDA C++ kernels in csrc/cuda/gradient_penalty.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern import _cuda
from gankern._cuda import refuse
from gankern._layout import dense, like_layout, memory_format
from gankern._native import acc_dtype

__all__ = ["KERNELS", "interpolate", "refuse", "tail"]

_BLOCK = 256
_CHUNK = 4096  # as in the source

#: Every specialisation that may be launched.
KERNELS = [
    _cuda.kernel("gradient_penalty", name, dtype)
    for dtype in _cuda.TYPES
    for name in ("interpolate", "penalty_squares", "penalty_tail")
]


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    real = dense(real)
    fake = like_layout(fake, real)
    alpha = alpha.to(acc_dtype(real.dtype)).contiguous()
    points = torch.empty_like(real, memory_format=memory_format(real))
    n = real.size(0)
    size = real.numel() // n
    chunks = -(-size // _CHUNK)
    packed = _cuda.packed(size, real, fake, points)
    kernel = _cuda.kernel("gradient_penalty", "interpolate", real.dtype)
    arguments = (real, fake, alpha, points, size, chunks, packed)
    _cuda.launch(kernel, n * chunks, _BLOCK, *arguments, device=real.device)
    return points


def tail(grad: Tensor, weight: float, target: float, one_sided: bool, squared: bool) -> tuple[Tensor, Tensor]:
    grad = dense(grad)
    cotangent = torch.empty_like(grad, memory_format=memory_format(grad))
    loss = grad.new_empty(())
    n = grad.size(0)
    size = grad.numel() // n
    chunks = -(-size // _CHUNK)
    squares = torch.empty(n, chunks, dtype=torch.float64, device=grad.device)
    packed = _cuda.packed(size, grad, cotangent)
    first, second = (_cuda.kernel("gradient_penalty", f"penalty_{name}", grad.dtype) for name in ("squares", "tail"))
    _cuda.launch(first, n * chunks, _BLOCK, grad, squares, size, chunks, packed, device=grad.device)
    arguments = (grad, squares, cotangent, loss, n, size, chunks, packed, weight / n, float(target))
    _cuda.launch(second, n * chunks, _BLOCK, *arguments, int(one_sided), int(squared), device=grad.device)
    return loss, cotangent
