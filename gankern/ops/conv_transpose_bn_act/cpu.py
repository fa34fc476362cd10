"""Adapter of the C++ kernels in csrc/cpu/batch_norm_act.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern import workspace
from gankern._layout import like_layout, memory_format
from gankern._native import ACTIVATIONS, DTYPES, acc_dtype, address, kernels, refuse, threads
from gankern.ops.conv_transpose_bn_act import reference

__all__ = ["backward", "forward_eval", "forward_train", "forward_train_from_sums", "refuse", "statistics"]


def _shape(input: Tensor, activation: str, negative_slope: float) -> Any:
    n, c = input.size(0), input.size(1)
    hw = input.numel() // (n * c) if input.numel() else 0
    # One pixel an image: both layouts are the same in memory, and rows are the one that vectorises.
    channels_last = memory_format(input) != torch.contiguous_format or hw == 1
    return kernels.BatchNormActShape(
        DTYPES[input.dtype],
        n,
        c,
        hw,
        channels_last,
        ACTIVATIONS[activation],
        negative_slope,
        threads(input.numel()),
    )


def _scratch(channels: int) -> Tensor:
    return torch.empty(kernels.batch_norm_act_scratch(channels), dtype=torch.float64)


def forward_train(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = workspace.empty_like(input, memory_format(input))
    mean = torch.empty(input.size(1), dtype=acc_dtype(input.dtype))
    invstd, var = torch.empty_like(mean), torch.empty_like(mean)
    scratch = _scratch(input.size(1))
    kernels.batch_norm_act_forward(
        _shape(input, activation, negative_slope),
        input.data_ptr(),
        address(weight),
        address(bias),
        output.data_ptr(),
        mean.data_ptr(),
        invstd.data_ptr(),
        var.data_ptr(),
        scratch.data_ptr(),
        True,
        eps,
    )
    return output, mean, invstd, var


def forward_train_from_sums(
    input: Tensor,
    sums: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As in passes.py."""
    mean, invstd, var = reference.statistics_of_sums(input, sums, eps)
    return forward_eval(input, weight, bias, mean, invstd, activation, negative_slope), mean, invstd, var


def statistics(input: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    # The kernel for training, although its output is not used: many times faster than torch.var_mean.
    _, *found = forward_train(input, None, None, eps, "none", 0.0)
    mean, invstd, var = found
    return mean, invstd, var


def forward_eval(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    negative_slope: float,
) -> Tensor:
    output = workspace.empty_like(input, memory_format(input))
    kernels.batch_norm_act_forward(
        _shape(input, activation, negative_slope),
        input.data_ptr(),
        address(weight),
        address(bias),
        output.data_ptr(),
        mean.data_ptr(),
        invstd.data_ptr(),
        0,
        0,
        False,
        0.0,
    )
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_output = like_layout(grad_output, input)
    grad_input = workspace.empty_like(input, memory_format(input))
    grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
    scratch = _scratch(input.size(1))
    kernels.batch_norm_act_backward(
        _shape(input, activation, negative_slope),
        grad_output.data_ptr(),
        input.data_ptr(),
        address(weight),
        address(bias),
        mean.data_ptr(),
        invstd.data_ptr(),
        grad_input.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        scratch.data_ptr(),
        training,
    )
    return grad_input, grad_weight, grad_bias
