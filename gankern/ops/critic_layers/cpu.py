"""Adapter of the C++ kernels in csrc/cpu/layer_norm.cpp (contiguous rows (M, D)) and csrc/cpu/conv_input_grad.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern._native import DTYPES, acc_dtype, address, kernels, refuse

__all__ = ["conv_input_grad", "layer_norm_backward", "layer_norm_double_backward", "layer_norm_forward", "refuse"]


def _shape(input: Tensor) -> Any:
    return kernels.LayerNormShape(DTYPES[input.dtype], *input.shape, torch.get_num_threads())


def _scratch(input: Tensor, sums: int) -> Tensor:
    parts = kernels.layer_norm_parts(input.size(0))
    return torch.empty(sums, parts, input.size(1), dtype=acc_dtype(input.dtype))


def layer_norm_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    output = torch.empty_like(input)
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
    grad_input = torch.empty_like(input)
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
    grad_grad_output, grad_input = torch.empty_like(input), torch.empty_like(input)
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


def conv_input_grad(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """Gradient of a channels_last input (N, C, H, W), of which only shape and dtype are used; weight channels_last."""
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    grad_input = torch.empty_like(input, memory_format=torch.channels_last)
    (n, c, h, w), (k, _, *kernel) = input.shape, weight.shape
    scratch = torch.empty(kernels.conv_input_grad_scratch(weight[0].numel(), k), dtype=input.dtype)
    kernels.conv_input_grad(
        DTYPES[input.dtype],
        (n, h, w, c),
        (*grad_output.shape[2:], k),
        kernel,
        stride,
        padding,
        dilation,
        grad_output.data_ptr(),
        weight.data_ptr(),
        grad_input.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_input
