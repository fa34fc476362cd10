"""Plain torch: the oracle of tests and benchmarks, and the ``reference`` backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "leaky_relu", "tanh", "none")


class ConvOptions(NamedTuple):
    """Arguments of ``aten.convolution`` behind the weight and bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class Layer(NamedTuple):
    """A convolution and its activation."""

    weight: Tensor
    bias: Tensor | None
    options: ConvOptions
    activation: str
    negative_slope: float


def refuse(*tensors: Tensor) -> str | None:
    return None


def activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    return torch.tanh(z) if activation == "tanh" else z


def activate_backward(grad_output: Tensor, output: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Gradient of an activation's input, by its output; the slope is 0 or more."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward.default(grad_output, output, 0)
    if activation == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward.default(grad_output, output, negative_slope, True)
    return torch.ops.aten.tanh_backward.default(grad_output, output) if activation == "tanh" else grad_output


def conv2d_acts(input: Tensor, layers: Sequence[Layer]) -> Tensor:
    for weight, bias, options, activation, negative_slope in layers:
        stride, padding, dilation, transposed, output_padding, groups = options
        if transposed:
            output = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
        else:
            output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        input = activate(output, activation, negative_slope)
    return input


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor as it is: only on the CPU is another layout worth a copy."""
    return tensor


def conv_shape(input: Sequence[int], weight: Sequence[int], options: ConvOptions) -> list[int]:
    """Sizes of a convolution's output, by those of its input and weight."""
    spatial = zip(input[2:], weight[2:], options.stride, options.padding, options.dilation, strict=True)
    if options.transposed:
        pads = options.output_padding
        sizes = [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for (n, k, s, p, d), o in zip(spatial, pads, strict=True)]
        return [input[0], weight[1] * options.groups, *sizes]
    return [input[0], weight[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spatial)]


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: ConvOptions,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> Tensor:
    return activate(torch.ops.aten.convolution.default(input, weight, bias, *options), activation, negative_slope)


conv_as_stock = conv


def _conv_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, options: ConvOptions, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward.default(grad_output, input, weight, None, *options, mask)


def conv_input_grad(
    grad_output: Tensor,
    weight: Tensor,
    input: Tensor,
    options: ConvOptions,
    activation: str = "none",
    negative_slope: float = 0.0,
) -> Tensor:
    """Gradient of what an activation made the input of; without one, of the input, only whose shape and dtype count."""
    grad_input = _conv_backward(grad_output, input, weight, options, [True, False, False])[0]
    return activate_backward(grad_input, input, activation, negative_slope)


def conv_weight_grad(grad_output: Tensor, input: Tensor, weight: Tensor, options: ConvOptions) -> Tensor:
    """Gradient of the weight, of which only the shape, dtype and layout are used."""
    return _conv_backward(grad_output, input, weight, options, [False, True, False])[1]
