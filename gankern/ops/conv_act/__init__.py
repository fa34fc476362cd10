"""Convolution and activation in one op: the layer of critics without batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from gankern._autograd import casts, is_traced
from gankern.ops import _check
from gankern.ops.conv_act import autograd, reference
from gankern.ops.conv_act.reference import ACTIVATIONS, ConvOptions, Layer, conv_shape

__all__ = ["conv2d_act"]

Size2 = int | tuple[int, int]


def conv2d_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    activation: str = "leaky_relu",
    negative_slope: float = 0.2,
) -> Tensor:
    """2-d convolution and activation.

    Parameters
    ----------
    input : Tensor
        Shape (N, C_in, H, W), any layout. The kernels take float32 on the CPU without groups, and on processors with
        matrix units (AMX) bfloat16, also by autocast; on a GPU they are asked for by name, for any floating type. All
        else is torch's.
    weight : Tensor
        Shape (C_out, C_in // groups, kH, kW), of the input's dtype.
    bias : Tensor or None
        Shape (C_out,).
    stride, padding, dilation, groups
        As in :func:`torch.nn.functional.conv2d`; padding "same" and "valid" too.
    activation : str
        "relu", "leaky_relu", "tanh" or "none".
    negative_slope : float
        Of "leaky_relu".

    Returns
    -------
    Tensor
        Shape (N, C_out, H_out, W_out); channels_last where a kernel ran.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the rule and what was received.

    Notes
    -----
    Differentiable to any order. On processors with AVX-512 the output has the bits of torch's convolution of contiguous
    images, so that no unit of a critic lies on the other side of zero than in stock.

    References
    ----------
    Radford, Metz and Chintala, "Unsupervised Representation Learning with DCGANs", 2016, section 3.
    """
    tensors = (input, weight, bias)
    if has_torch_function(tensors):
        options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        options |= {"activation": activation, "negative_slope": negative_slope}
        return handle_torch_function(conv2d_act, tensors, *tensors, **options)
    if is_traced(input):
        output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return reference.activate(output, activation, negative_slope)
    _check.floating("input", input)
    _check.ndim("input", input, 4, "(N, C_in, H, W)")
    _check.floating("weight", weight)
    _check.ndim("weight", weight, 4, "(C_out, C_in // groups, kH, kW)")
    _check.same_device("weight", weight, "input", input)
    if bias is not None:
        _check.vector("bias", bias, weight.size(0))
        _check.same_device("bias", bias, "input", input)
    if not casts(input):
        _check.same_dtype("weight", weight, "input", input)
        if bias is not None:
            _check.same_dtype("bias", bias, "input", input)
    groups = _check.positive_int("groups", groups)
    _check.one_of("activation", activation, ACTIVATIONS)
    negative_slope = _check.number("negative_slope", negative_slope, finite=False)
    if weight.size(1) * groups != input.size(1):
        raise ValueError(
            f"weight must have input's {input.size(1)} channels / groups {groups} as its second size; got "
            f"{tuple(weight.shape)}"
        )
    strides, dilations = _check.int_pair("stride", stride, 1), _check.int_pair("dilation", dilation, 1)
    input, pads = padded(input, padding, weight, strides, dilations)
    geometry = ConvOptions(strides, pads, dilations, False, (0, 0), groups)
    sizes = [
        n + 2 * p - d * (k - 1)
        for n, k, p, d in zip(input.shape[2:], weight.shape[2:], geometry.padding, geometry.dilation, strict=True)
    ]
    if min(sizes) < 1:
        raise ValueError(f"input must be at least as large as the kernel; got {tuple(input.shape)}")
    return autograd.conv2d_acts(input, [Layer(weight, bias, geometry, activation, negative_slope)])


def padded(
    input: Tensor, padding: Size2 | str, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Padding in numbers, and the input with what "same" has more of at one end."""
    pads, (bottom, right) = _check.padding(padding, weight.shape[2:], stride, dilation)
    return F.pad(input, (0, right, 0, bottom)) if bottom or right else input, pads


def conv2d_acts(input: Tensor, layers: Sequence[Layer]) -> Tensor:
    """:func:`conv2d_act` layer by layer, as one node of the graph where that is possible; transposed ones too."""
    if has_torch_function((input,)):
        return handle_torch_function(conv2d_acts, (input,), input, layers)
    if is_traced(input) or _fit(input, layers):
        return autograd.conv2d_acts(input, layers)
    for layer in layers:
        weight, bias, options, activation, negative_slope = layer
        if options.transposed:
            input = reference.conv2d_acts(input, [layer])
            continue
        geometry: dict[str, Any] = {"stride": options.stride, "padding": options.padding, "dilation": options.dilation}
        act: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope}
        input = conv2d_act(input, weight, bias, groups=options.groups, **geometry, **act)
    return input


def conv2d_statistics(input: Tensor, layer: Layer) -> tuple[Tensor, Tensor] | None:
    """A layer's convolution without activation, and what the statistics of its output are made of.

    The sums of each channel's values and of their squares, (parts, 2, C_out) in float64; None where what runs the
    convolution leaves none.
    """
    return autograd.conv2d_statistics(input, layer) if _fit(input, [layer]) else None


def _fit(input: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether each layer takes what the one before makes."""
    shape: Sequence[int] = input.shape
    is_cast = casts(input)
    for weight, _, options, *_ in layers:
        same = (is_cast or weight.dtype == input.dtype) and weight.device == input.device
        channels = weight.size(0) if options.transposed else weight.size(1) * options.groups
        if not same or channels != shape[1]:
            return False
        shape = conv_shape(shape, weight.shape, options)
        if min(shape[2:]) < 1:
            return False
    return True
