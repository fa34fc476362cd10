"""Adapter of the CUDA C++ kernels in csrc/cuda: norm.cu and critic_layers.cu; torch's convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern import _cuda
from gankern._cuda import refuse
from gankern.ops.critic_layers import cuda_norms
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
    "KERNELS",
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

_THREADS = 256

#: Every specialisation that may be launched.
KERNELS = [
    *cuda_norms.KERNELS,
    *(
        _cuda.kernel("critic_layers", name, dtype)
        for dtype in _cuda.TYPES
        for name in ("avg_pool", "avg_pool_backward", "bias_act")
    ),
]

(
    layer_norm_forward,
    layer_norm_backward,
    layer_norm_double_backward,
    group_norm_forward,
    group_norm_backward,
    group_norm_double_backward,
) = functions(cuda_norms.CudaNorms())


def _start(name: str, rows: int, width: int, like: Tensor, *arguments: Tensor | float) -> None:
    """A kernel of rows of so many items, of which a thread takes one; its last argument is the width of a block."""
    across = min(_THREADS, 1 << (width - 1).bit_length())
    blocks = -(-rows // (_THREADS // across))
    kernel = _cuda.kernel("critic_layers", name, like.dtype)
    _cuda.launch(kernel, blocks, _THREADS, *arguments, across, device=like.device)


def avg_pool2d(input: Tensor, kernel: list[int]) -> Tensor:
    input = input.contiguous()
    n, channels, height, width = input.shape
    output = input.new_empty(n, channels, height // kernel[0], width // kernel[1])
    rows = n * channels * output.size(2)
    _start("avg_pool", rows, output.size(3), input, input, output, n * channels, height, width, *kernel)
    return output


def avg_pool2d_backward(grad_output: Tensor, shape: torch.Size, kernel: list[int]) -> Tensor:
    grad_output = grad_output.contiguous()
    n, channels, height, width = shape
    grad = grad_output.new_empty(shape)
    rows = n * channels * height
    _start("avg_pool_backward", rows, width, grad, grad_output, grad, n * channels, height, width, *kernel)
    return grad


def _bias_act(output: Tensor, bias: Tensor, negative_slope: float) -> None:
    n, channels = output.shape[:2]
    last = is_last(output)
    inner = output[0, 0].numel()
    rows, width = (n * inner, channels) if last else (n * channels, inner)
    packed = _cuda.packed(width, output)
    lanes = 16 // output.element_size() if packed else 1
    arguments = (output, bias, rows, width, channels, last, float(negative_slope), packed)
    _start("bias_act", rows, -(-width // lanes), output, *arguments)


conv = conv_as_stock = convolution(_bias_act)
