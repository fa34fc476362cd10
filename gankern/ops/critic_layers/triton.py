"""Triton kernels of the critic layers: norms, average pooling and what follows a convolution; torch's convolutions.

Pooling and bias are bound by bytes: each value is read and written once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern import _triton
from gankern._triton import refuse
from gankern.ops.critic_layers import triton_norms
from gankern.ops.critic_layers.gpu import conv_input_grad, convolution, is_last
from gankern.ops.critic_layers.norms import functions
from gankern.ops.critic_layers.reference import (
    TURNS,
    add,
    batch_norm_backward,
    batch_norm_double_backward,
    batch_norm_forward,
    channels_last,
    conv_weight_grad,
    leaky_relu,
    leaky_relu_backward,
    like_layout,
    room,
)

__all__ = [
    "COMPILED",
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
]

(
    layer_norm_forward,
    layer_norm_backward,
    layer_norm_double_backward,
    group_norm_forward,
    group_norm_backward,
    group_norm_double_backward,
) = functions(triton_norms.TritonNorms())


@triton.jit
def _avg_pool(
    values,
    output,
    count,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    T: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    windows = width // KW
    row = i // windows
    rows = height // KH
    start = values + (row // rows * height + row % rows * KH) * width + i % windows * KW
    total = tl.zeros([BLOCK], A)  # in torch's order
    for y in range(KH):
        for x in tl.static_range(KW):
            total += tl.load(start + y * width + x, mask, 0.0).to(A)
    tl.store(output + i, (total / (KH * KW)).to(T), mask)


@triton.jit
def _avg_pool_backward(
    grad,
    output,
    count,
    height,
    width,
    KH: tl.constexpr,
    KW: tl.constexpr,
    T: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    windows = width // KW
    rows = height // KH
    line = i // width
    y = line % height // KH
    x = i % width // KW
    inside = mask & (y < rows) & (x < windows)
    value = tl.load(grad + (line // height * rows + y) * windows + x, inside, 0.0).to(A)
    tl.store(output + i, (value / (KH * KW)).to(T), mask)


@triton.jit(do_not_specialize=["slope"])
def _bias_act(
    values,
    bias,
    count,
    width,
    channels,
    slope,
    LAST: tl.constexpr,
    LEAKY: tl.constexpr,
    T: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    channel = i % channels if LAST else i // width % channels
    z = tl.load(values + i, mask, 0.0).to(A) + tl.load(bias + channel, mask, 0.0).to(A)
    z = z.to(T).to(A)  # rounded as where the sum is stored before the activation reads it again
    if LEAKY:
        z = tl.where(z > 0, z, z * slope.to(tl.int64).to(tl.float64, bitcast=True).to(A))
    else:
        z = tl.where(z < 0, 0.0, z)  # a NaN stays
    tl.store(values + i, z.to(T), mask)


_BLOCK = {"BLOCK": 1024, "num_warps": 4}

_POOL = {"output": "T*", "count": "i64", "height": "i32", "width": "i32"}
_ACT = {"values": "T*", "bias": "T*", "count": "i64", "width": "i32", "channels": "i32", "slope": "i64"}

_KINDS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (_avg_pool, {"values": "T*", **_POOL}, {"KH": 2, "KW": 2}),
    (_avg_pool_backward, {"grad": "T*", **_POOL}, {"KH": 2, "KW": 2}),
    (_bias_act, _ACT, {"LAST": False, "LEAKY": True}),
    (_bias_act, _ACT, {"LAST": True, "LEAKY": False}),
]

#: One specialisation of every kind that may be launched; windows follow the call.
COMPILED = [
    *triton_norms.COMPILED,
    *(
        _triton.compiled(kernel, types, dtype, **constants, **_BLOCK)
        for dtype in _triton.TYPES
        for kernel, types, constants in _KINDS
    ),
]


def _start(kernel: Any, tensor: Tensor, *arguments: Any, **constants: Any) -> None:
    """For each value of a tensor."""
    grid = (triton.cdiv(tensor.numel(), _BLOCK["BLOCK"]),)
    _triton.start(kernel, grid, *arguments, device=tensor.device, **constants, **_triton.types(tensor.dtype), **_BLOCK)


def avg_pool2d(input: Tensor, kernel: list[int]) -> Tensor:
    input = input.contiguous()
    n, channels, height, width = input.shape
    output = input.new_empty(n, channels, height // kernel[0], width // kernel[1])
    arguments = (input, output, output.numel(), height, width)
    _start(_avg_pool, output, *arguments, KH=kernel[0], KW=kernel[1])
    return output


def avg_pool2d_backward(grad_output: Tensor, shape: torch.Size, kernel: list[int]) -> Tensor:
    grad_output = grad_output.contiguous()
    grad = grad_output.new_empty(shape)
    arguments = (grad_output, grad, grad.numel(), shape[2], shape[3])
    _start(_avg_pool_backward, grad, *arguments, KH=kernel[0], KW=kernel[1])
    return grad


def _add_and_activate(output: Tensor, bias: Tensor, negative_slope: float) -> None:
    inner = output[0, 0].numel()
    arguments = (output, bias, output.numel(), inner, output.size(1), _triton.bits(negative_slope))
    _start(_bias_act, output, *arguments, LAST=is_last(output), LEAKY=negative_slope != 0)


conv = conv_as_stock = convolution(_add_and_activate)
