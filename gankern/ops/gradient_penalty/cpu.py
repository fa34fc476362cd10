"""Adapter of the C++ kernels in csrc/cpu/gradient_penalty.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern._layout import dense, like_layout, memory_format
from gankern._native import DTYPES, acc_dtype, kernels, refuse, threads

__all__ = ["interpolate", "refuse", "tail"]


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    real = dense(real)
    fake = like_layout(fake, real)
    alpha = alpha.to(acc_dtype(real.dtype)).contiguous()
    points = torch.empty_like(real, memory_format=memory_format(real))
    n = real.size(0)
    kernels.interpolate(
        DTYPES[real.dtype],
        n,
        real.numel() // n,
        real.data_ptr(),
        fake.data_ptr(),
        alpha.data_ptr(),
        points.data_ptr(),
        threads(real.numel()),
    )
    return points


def tail(grad: Tensor, weight: float, target: float, one_sided: bool, squared: bool) -> tuple[Tensor, Tensor]:
    grad = dense(grad)
    cotangent = torch.empty_like(grad, memory_format=memory_format(grad))
    loss = torch.empty((), dtype=grad.dtype)
    n = grad.size(0)
    scratch = torch.empty(n, dtype=torch.float64)
    kernels.penalty_tail(
        DTYPES[grad.dtype],
        n,
        grad.numel() // n,
        grad.data_ptr(),
        cotangent.data_ptr(),
        loss.data_ptr(),
        scratch.data_ptr(),
        weight,
        target,
        one_sided,
        squared,
        threads(grad.numel()),
    )
    return loss, cotangent
