"""Adapter of the C++ kernels in csrc/cpu: layer_norm.cpp, group_norm.cpp, batch_norm.cpp and avg_pool.cpp.

Layer norm's tensors are contiguous rows (M, D), group norm's (N, C, L) and batch norm's (N, C, ...), contiguous or
with the channels last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern import workspace
from gankern._layout import memory_format
from gankern._native import DTYPES, acc_dtype, address, kernels, refuse, threads
from gankern.ops.conv_act.cpu import (
    activate_backward,
    channels_last,
    conv,
    conv_as_stock,
    conv_input_grad,
    conv_weight_grad,
    takes_conv,
)

__all__ = [
    "TURNS",
    "add",
    "avg_pool2d",
    "avg_pool2d_backward",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_forward",
    "channels_last",
    "conv",
    "conv_as_stock",
    "conv_input_grad",
    "conv_weight_grad",
    "group_norm_backward",
    "group_norm_double_backward",
    "group_norm_forward",
    "layer_norm_backward",
    "layer_norm_double_backward",
    "layer_norm_forward",
    "leaky_relu",
    "leaky_relu_backward",
    "like_layout",
    "refuse",
    "room",
    "takes_conv",
]

#: All passes of a 2-d convolution are nearer the peak in channels_last.
TURNS = True


def _shape(input: Tensor) -> Any:
    return kernels.LayerNormShape(DTYPES[input.dtype], *input.shape, threads(input.numel()))


def _scratch(input: Tensor, sums: int) -> Tensor:
    parts = kernels.layer_norm_parts(input.size(0))
    return torch.empty(sums, parts, input.size(1), dtype=acc_dtype(input.dtype))


def layer_norm_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    output = workspace.like(input)
    mean, rstd = torch.empty(2, input.size(0), dtype=torch.float64).unbind()
    kernels.layer_norm_forward(
        _shape(input),
        input.data_ptr(),
        address(weight),
        address(bias),
        output.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        eps,
    )
    return output, mean, rstd


def layer_norm_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, want_params: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad_output = grad_output.contiguous()
    grad_input = workspace.like(input)
    grad_weight = torch.empty(input.size(1), dtype=input.dtype) if want_params else None
    grad_bias = torch.empty(input.size(1), dtype=input.dtype) if want_params else None
    scratch = _scratch(input, 2) if want_params else None
    kernels.layer_norm_backward(
        _shape(input),
        grad_output.data_ptr(),
        input.data_ptr(),
        address(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        grad_input.data_ptr(),
        address(grad_weight),
        address(grad_bias),
        address(scratch),
    )
    return grad_input, grad_weight, grad_bias


def layer_norm_double_backward(
    tangent: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    tangent, grad_output = tangent.contiguous(), grad_output.contiguous()
    grad_grad_output, grad_input = workspace.like(input), workspace.like(input)
    grad_weight = torch.empty(input.size(1), dtype=input.dtype) if want_weight else None
    scratch = _scratch(input, 1) if want_weight else None
    kernels.layer_norm_double_backward(
        _shape(input),
        tangent.data_ptr(),
        grad_output.data_ptr(),
        input.data_ptr(),
        address(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        grad_grad_output.data_ptr(),
        grad_input.data_ptr(),
        address(grad_weight),
        address(scratch),
    )
    return grad_grad_output, grad_input, grad_weight


def like_layout(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor in the memory order of another of the same shape."""
    order = memory_format(other)
    if tensor.is_contiguous(memory_format=order):
        return tensor
    return workspace.empty_like(tensor, order).copy_(tensor)


def add(first: Tensor, second: Tensor) -> Tensor:
    return torch.add(first, second, out=workspace.empty_like(first, memory_format(first)))


def leaky_relu(input: Tensor, negative_slope: float) -> Tensor:
    output = workspace.empty_like(input, memory_format(input))
    # The same as ReLU where the slope is 0, but for the sign of that zero.
    if negative_slope == 0:
        return torch.clamp_min(input, 0, out=output)
    return torch.ops.aten.leaky_relu.out(input, negative_slope, out=output)


def leaky_relu_backward(grad_output: Tensor, output: Tensor, negative_slope: float) -> Tensor:
    """Gradient of the input, by the signs of the output."""
    return activate_backward(grad_output, output, "leaky_relu" if negative_slope else "relu", negative_slope)


def _group_shape(input: Tensor, mean: Tensor) -> Any:
    samples, channels, inner = input.shape
    groups = mean.size(1)
    last = not input.is_contiguous()
    return kernels.GroupNormShape(
        DTYPES[input.dtype], samples, groups, channels // groups, inner, last, threads(input.numel())
    )


def _as(tensor: Tensor, input: Tensor) -> Tensor:
    """The tensor in the memory order of the input."""
    if input.is_contiguous():
        return tensor.contiguous()
    return tensor if tensor.stride() == input.stride() else torch.empty_like(input).copy_(tensor)


def group_norm_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    output = workspace.like(input)
    mean, rstd = torch.empty(2, input.size(0), groups, dtype=torch.float64).unbind()
    kernels.group_norm_forward(
        _group_shape(input, mean),
        input.data_ptr(),
        address(weight),
        address(bias),
        output.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        eps,
    )
    return output, mean, rstd


def group_norm_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, want_params: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad_output = _as(grad_output, input)
    grad_input = workspace.like(input)
    grad_weight = torch.empty(input.size(1), dtype=input.dtype) if want_params else None
    grad_bias = torch.empty(input.size(1), dtype=input.dtype) if want_params else None
    scratch = torch.empty(2, *input.shape[:2], dtype=torch.float64) if want_params else None
    kernels.group_norm_backward(
        _group_shape(input, mean),
        grad_output.data_ptr(),
        input.data_ptr(),
        address(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        grad_input.data_ptr(),
        address(grad_weight),
        address(grad_bias),
        address(scratch),
    )
    return grad_input, grad_weight, grad_bias


def group_norm_double_backward(
    tangent: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    tangent, grad_output = _as(tangent, input), _as(grad_output, input)
    grad_grad_output, grad_input = workspace.like(input), workspace.like(input)
    grad_weight = torch.empty(input.size(1), dtype=input.dtype) if want_weight else None
    scratch = torch.empty(input.shape[:2], dtype=torch.float64) if want_weight else None
    kernels.group_norm_double_backward(
        _group_shape(input, mean),
        tangent.data_ptr(),
        grad_output.data_ptr(),
        input.data_ptr(),
        address(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        grad_grad_output.data_ptr(),
        grad_input.data_ptr(),
        address(grad_weight),
        address(scratch),
    )
    return grad_grad_output, grad_input, grad_weight


def _batch_shape(input: Tensor) -> Any:
    n, channels = input.shape[:2]
    inner, last = input.numel() // (n * channels), not input.is_contiguous()
    return kernels.BatchNormShape(DTYPES[input.dtype], n, channels, inner, last, threads(input.numel()))


def batch_norm_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = workspace.like(input)
    mean, rstd, var = torch.empty(3, input.size(1), dtype=torch.float64).unbind()
    kernels.batch_norm_forward(
        _batch_shape(input),
        input.data_ptr(),
        address(weight),
        address(bias),
        output.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        var.data_ptr(),
        eps,
    )
    return output, mean, rstd, var


def batch_norm_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, want_params: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad_output = _as(grad_output, input)
    grad_input = workspace.like(input)
    grad_weight = torch.empty(input.size(1), dtype=input.dtype) if want_params else None
    grad_bias = torch.empty(input.size(1), dtype=input.dtype) if want_params else None
    kernels.batch_norm_backward(
        _batch_shape(input),
        grad_output.data_ptr(),
        input.data_ptr(),
        address(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        grad_input.data_ptr(),
        address(grad_weight),
        address(grad_bias),
    )
    return grad_input, grad_weight, grad_bias


def batch_norm_double_backward(
    tangent: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    tangent, grad_output = _as(tangent, input), _as(grad_output, input)
    grad_grad_output, grad_input = workspace.like(input), workspace.like(input)
    grad_weight = torch.empty(input.size(1), dtype=input.dtype) if want_weight else None
    kernels.batch_norm_double_backward(
        _batch_shape(input),
        tangent.data_ptr(),
        grad_output.data_ptr(),
        input.data_ptr(),
        address(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        grad_grad_output.data_ptr(),
        grad_input.data_ptr(),
        address(grad_weight),
    )
    return grad_grad_output, grad_input, grad_weight


def room(tensor: Tensor, shape: torch.Size, memory_format: torch.memory_format) -> Tensor:
    """Memory for images like a tensor's, of another shape."""
    return workspace.empty(shape, tensor.dtype, memory_format)


def avg_pool2d(input: Tensor, kernel: list[int]) -> Tensor:
    input = input.contiguous()
    n, channels, height, width = input.shape
    output = workspace.empty((n, channels, height // kernel[0], width // kernel[1]), input.dtype)
    kernels.avg_pool_forward(
        DTYPES[input.dtype],
        n * channels,
        height,
        width,
        *kernel,
        input.data_ptr(),
        output.data_ptr(),
        threads(input.numel()),
    )
    return output


def avg_pool2d_backward(grad_output: Tensor, shape: torch.Size, kernel: list[int]) -> Tensor:
    grad_output = grad_output.contiguous()
    n, channels, height, width = shape
    grad_input = workspace.empty(shape, grad_output.dtype)
    kernels.avg_pool_backward(
        DTYPES[grad_output.dtype],
        n * channels,
        height,
        width,
        *kernel,
        grad_output.data_ptr(),
        grad_input.data_ptr(),
        threads(grad_input.numel()),
    )
    return grad_input
