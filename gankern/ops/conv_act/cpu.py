"""Adapter of csrc/cpu/conv.cpp and stem_input_grad.cpp; torch's convolutions where those do not apply.

Images and their gradients are channels_last; results are, too, and lie in the workspace.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import _native, workspace
from gankern._layout import dense, like_layout, memory_format
from gankern._native import ACTIVATIONS, DTYPES, address, kernels, span
from gankern.ops.conv_act import reference
from gankern.ops.conv_act.reference import ConvOptions

# Up to so many input channels the vectors of the input's gradient run along the taps.
_STEM = 4
# Channels that oneDNN sums up at a time with AVX-512.
_SUM_BLOCK = 16


def refuse(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            return f"needs float32; got {tensor.dtype}"
    return _native.refuse(*tensors)


def activate_(output: Tensor, activation: str, negative_slope: float) -> Tensor:
    """In place, in memory that nobody else has seen."""
    if activation == "leaky_relu":
        return F.leaky_relu_(output, negative_slope)
    return output.relu_() if activation == "relu" else output.tanh_() if activation == "tanh" else output


def activate_backward(grad_output: Tensor, output: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Gradient of an activation's input, by its output; the slope is 0 or more."""
    if activation == "none":
        return grad_output
    grad_input = workspace.empty_like(grad_output, memory_format(grad_output))
    if activation == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad_output, output, 0, grad_input=grad_input)
    if activation == "tanh":
        return torch.ops.aten.tanh_backward.grad_input(grad_output, output, grad_input=grad_input)
    backward = torch.ops.aten.leaky_relu_backward.grad_input
    return backward(grad_output, output, negative_slope, True, grad_input=grad_input)


def _ours(input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions) -> bool:
    """Whether the kernels take it. What torch would refuse is left to it, too."""
    if not input.dtype == weight.dtype == torch.float32 or (bias is not None and bias.dtype != torch.float32):
        return False
    return _fits(input.shape, weight.shape, None if bias is None else bias.shape, options)


@lru_cache(maxsize=1024)
def _fits(input: torch.Size, weight: torch.Size, bias: torch.Size | None, options: ConvOptions) -> bool:
    return (
        len(input) == len(weight) == 4
        and options.groups == 1
        and not options.transposed
        and input[1] == weight[1]
        and bias in (None, weight[:1])
        and min(*options.stride, *options.dilation) > 0
        and min(options.padding) >= 0
        and min(*input, *weight, *reference.conv_shape(input, weight, options)) > 0
    )


@lru_cache(maxsize=1024)
def _shape(
    input: torch.Size,
    output: torch.Size,
    weight: torch.Size,
    weight_strides: tuple[int, ...],
    options: ConvOptions,
    sum_block: int,
    threads: int,
) -> Any:
    n, c, h, w = input
    return kernels.ConvShape(
        (n, h, w, c), (*output[2:], output[1]), weight[2:], *options[:3], weight_strides, sum_block, threads
    )


def _shape_of(input: Tensor, output: Tensor, weight: Tensor, options: ConvOptions, sum_block: int = 0) -> Any:
    return _shape(input.shape, output.shape, weight.shape, weight.stride(), options, sum_block, torch.get_num_threads())


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor in channels_last, in which all passes of a 2-d convolution are nearer the peak."""
    if tensor.dim() != 4 or tensor.dtype not in (torch.float32, torch.bfloat16):
        return tensor
    # Not contiguous(), which leaves images of one pixel as they are: convolutions go by the strides.
    if memory_format(tensor) == torch.channels_last:
        return tensor
    return workspace.empty_like(tensor, torch.channels_last).copy_(tensor)


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: ConvOptions,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> Tensor:
    if not _ours(input, weight, bias, options):
        output = reference.conv(channels_last(input), channels_last(weight), bias, options)
        return activate_(output, activation, negative_slope)
    return _conv(input, weight, bias, options, 0, activation, negative_slope)


def conv_as_stock(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: ConvOptions,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> Tensor:
    """The convolution with the bits of torch's of contiguous images."""
    if _ours(input, weight, bias, options) and _sums_in_blocks(input, weight, bias, options):
        return _conv(input, weight, bias, options, _SUM_BLOCK, activation, negative_slope)
    output = reference.conv(input.contiguous() if weight.is_contiguous() else input, weight, bias, options)
    return activate_(output, activation, negative_slope)


def _sums_in_blocks(input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions) -> bool:
    """Whether torch leaves it to oneDNN's kernels for AVX-512, which sum up 16 channels at a time."""
    if kernels.cpu_isa() != "avx512" or not weight.is_contiguous() or weight.shape[2:] == (1, 1):
        return False
    # Where pixels of the output see nothing but padding, it takes a matrix product instead.
    reach = ((k - 1) * d for k, d in zip(weight.shape[2:], options.dilation, strict=True))
    if any(p > most for p, most in zip(options.padding, reach, strict=True)):
        return False
    bias_size = None if bias is None else weight.size(0)
    return _is_mkldnn(
        input.shape, weight.shape, bias_size, options, torch.get_num_threads(), torch.backends.mkldnn.enabled
    )


@lru_cache(maxsize=1024)
def _is_mkldnn(
    input: torch.Size, weight: torch.Size, bias_size: int | None, options: ConvOptions, threads: int, enabled: bool
) -> bool:
    given = torch.empty(input), torch.empty(weight), None if bias_size is None else torch.empty(bias_size)
    chosen = torch._C._select_conv_backend(*given, *options, None if bias_size is None else [bias_size])
    return chosen == torch._C._ConvBackend.Mkldnn  # type: ignore[attr-defined]


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: ConvOptions,
    sum_block: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    input = channels_last(input)
    output = workspace.empty(reference.conv_shape(input.shape, weight.shape, options), input.dtype, torch.channels_last)
    shape = _shape_of(input, output, weight, options, sum_block)
    bias = None if bias is None else bias.contiguous()
    # torch's tanh, since that is what its users compare with.
    fused = "none" if activation == "tanh" else activation
    addresses = input.data_ptr(), weight.data_ptr(), address(bias), output.data_ptr()
    with span("gankern::conv"):
        kernels.conv_forward(shape, *addresses, ACTIVATIONS[fused], negative_slope)
    return output if fused == activation else activate_(output, activation, negative_slope)


def conv_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    options: ConvOptions,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> Tensor:
    """Gradient of what an activation made the input of; without one, of the input, only whose shape and dtype count."""
    if not _ours(input, weight, None, options):
        grad_input = reference.conv_input_grad(grad_output, channels_last(weight), input, options)
        return _activate_backward(grad_input, input, activation, negative_slope)
    grad_output = channels_last(grad_output)
    if input.size(1) <= _STEM:
        grad_input = _stem_input_grad(grad_output, channels_last(weight), input, options)
        return _activate_backward(grad_input, input, activation, negative_slope)
    shape = _shape_of(input, grad_output, weight, options)
    activated = None if activation == "none" else channels_last(input)
    grad_input = workspace.empty_like(input, torch.channels_last)
    addresses = grad_output.data_ptr(), weight.data_ptr(), grad_input.data_ptr(), address(activated)
    with span("gankern::conv_input_grad"):
        kernels.conv_input_grad(shape, *addresses, ACTIVATIONS[activation], negative_slope)
    return grad_input


def _activate_backward(grad_output: Tensor, output: Tensor, activation: str, negative_slope: float) -> Tensor:
    return activate_backward(grad_output, like_layout(output, grad_output), activation, negative_slope)


def conv_weight_grad(grad_output: Tensor, input: Tensor, weight: Tensor, options: ConvOptions) -> Tensor:
    """Gradient of the weight, of which only the shape, dtype and layout are used."""
    if not _ours(input, weight, None, options):
        return reference.conv_weight_grad(grad_output, input, channels_last(weight), options)
    grad_output, input, weight = channels_last(grad_output), channels_last(input), dense(weight)
    shape = _shape_of(input, grad_output, weight, options)
    grad_weight = workspace.like(weight)
    addresses = grad_output.data_ptr(), input.data_ptr(), grad_weight.data_ptr()
    with span("gankern::conv_weight_grad"):
        kernels.conv_weight_grad(shape, *addresses)
    return grad_weight


def _stem_input_grad(grad_output: Tensor, weight: Tensor, input: Tensor, options: ConvOptions) -> Tensor:
    grad_input = workspace.empty_like(input, torch.channels_last)
    (n, c, h, w), (k, _, *kernel) = input.shape, weight.shape
    scratch = torch.empty(kernels.stem_input_grad_scratch(weight[0].numel(), k), dtype=input.dtype)
    with span("gankern::conv_input_grad"):
        kernels.stem_input_grad(
            DTYPES[input.dtype],
            (n, h, w, c),
            (*grad_output.shape[2:], k),
            kernel,
            *options[:3],
            grad_output.data_ptr(),
            weight.data_ptr(),
            grad_input.data_ptr(),
            scratch.data_ptr(),
            torch.get_num_threads(),
        )
    return grad_input
