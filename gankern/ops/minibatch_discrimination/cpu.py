"""Adapter of the C++ kernels in csrc/cpu/minibatch_discrimination.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern._native import DTYPES, kernels, refuse, threads

__all__ = [
    "distance",
    "distance_backward",
    "distance_tangent",
    "features",
    "features_backward",
    "features_double_backward",
    "refuse",
]

_LINE = 8  # doubles in a line of scratch


def _shape(m: Tensor) -> Any:
    n, b, c = m.shape
    return kernels.MinibatchShape(DTYPES[m.dtype], n, b, c, threads(n * m.numel()))


def _scratch(lines: int) -> Tensor:
    return torch.empty(lines * _LINE, dtype=torch.float64)


def features(m: Tensor, include_self: bool) -> Tensor:
    m = m.contiguous()
    output = torch.empty(m.shape[:2], dtype=m.dtype)
    if output.numel():
        shape = _shape(m)
        scratch = _scratch(kernels.minibatch_discrimination_scratch(shape))
        kernels.minibatch_discrimination_forward(
            shape, m.data_ptr(), output.data_ptr(), scratch.data_ptr(), include_self
        )
    return output


def features_backward(grad_output: Tensor, m: Tensor) -> Tensor:
    grad_output, m = grad_output.contiguous(), m.contiguous()
    grad_m = torch.empty_like(m)
    if m.numel():
        shape = _shape(m)
        scratch = _scratch(kernels.minibatch_discrimination_scratch(shape))
        kernels.minibatch_discrimination_backward(
            shape, grad_output.data_ptr(), m.data_ptr(), grad_m.data_ptr(), scratch.data_ptr()
        )
    return grad_m


def features_double_backward(cotangent: Tensor, grad_output: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    cotangent, grad_output, m = cotangent.contiguous(), grad_output.contiguous(), m.contiguous()
    grad_grad_output, grad_m = torch.empty_like(grad_output), torch.empty_like(m)
    if grad_output.numel():
        shape = _shape(m)
        scratch = _scratch(kernels.minibatch_discrimination_scratch(shape))
        kernels.minibatch_discrimination_double_backward(
            shape,
            cotangent.data_ptr(),
            grad_output.data_ptr(),
            m.data_ptr(),
            grad_grad_output.data_ptr(),
            grad_m.data_ptr(),
            scratch.data_ptr(),
        )
    return grad_grad_output, grad_m


def distance(m: Tensor) -> Tensor:
    m = m.contiguous()
    n, b, _ = m.shape
    output = torch.empty((n, n, b), dtype=m.dtype)
    if output.numel():
        shape = _shape(m)
        scratch = _scratch(kernels.l1_distance_scratch(shape))
        kernels.l1_distance_forward(shape, m.data_ptr(), output.data_ptr(), scratch.data_ptr())
    return output


def distance_backward(grad_output: Tensor, m: Tensor) -> Tensor:
    grad_output, m = grad_output.contiguous(), m.contiguous()
    grad_m = torch.empty_like(m)
    if m.numel():
        shape = _shape(m)
        scratch = _scratch(kernels.l1_distance_scratch(shape))
        kernels.l1_distance_backward(shape, grad_output.data_ptr(), m.data_ptr(), grad_m.data_ptr(), scratch.data_ptr())
    return grad_m


def distance_tangent(tangent: Tensor, m: Tensor) -> Tensor:
    tangent, m = tangent.contiguous(), m.contiguous()
    n, b, _ = m.shape
    output = torch.empty((n, n, b), dtype=m.dtype)
    if output.numel():
        shape = _shape(m)
        scratch = _scratch(kernels.l1_distance_scratch(shape))
        kernels.l1_distance_tangent(shape, tangent.data_ptr(), m.data_ptr(), output.data_ptr(), scratch.data_ptr())
    return output
