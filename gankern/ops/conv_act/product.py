"""Convolutions of many channels and few pixels as matrix products, in bfloat16.

torch's own are far from the rate of its matrix product there: for a transposed convolution of 64 images of 4x4 pixels
from 512 to 256 channels it takes five times as long for the output, and ten times for the gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import backends
from gankern.ops.conv_act import reference
from gankern.ops.conv_act.reference import ConvOptions

# Pixels of the side without the stride over its channels: beyond, the columns cost what the product saves.
_MOST_PIXELS, _MOST_PIXELS_FORWARD = 16, 4
# Elements of a weight from which on torch's output is slow, too.
_LARGE_WEIGHT = 1 << 20


def applies(input: Tensor, weight: Tensor, options: ConvOptions) -> bool:
    """Whether a convolution on the CPU, transposed or not, is one of these: in bfloat16, by autocast or by itself."""
    if torch.compiler.is_compiling() or input.device.type != "cpu" or backends.requested() == "reference":
        return False
    dtypes = {torch.get_autocast_dtype("cpu")} if torch.is_autocast_enabled("cpu") else {input.dtype, weight.dtype}
    if dtypes != {torch.bfloat16} or torch.float64 in (input.dtype, weight.dtype):
        return False
    if options.groups != 1 or options.dilation != (1, 1) or not _has_matrix_units():
        return False
    return 0 < _pixels(input, weight, options) <= _MOST_PIXELS * weight.size(0) and min(weight.shape[:2]) >= 64


def _pixels(input: Tensor, weight: Tensor, options: ConvOptions) -> int:
    """Of all images on the side without the stride."""
    n, _, h, w = input.shape if options.transposed else reference.conv_shape(input.shape, weight.shape, options)
    return n * h * w


def _has_matrix_units() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def _columns(images: Tensor, kernel: Sequence[int], options: ConvOptions) -> Tensor:
    """What each pixel of the side without the stride sees: (N * h * w, kH * kW * C), of images (N, C, H, W)."""
    (top, left), (down, right) = options.padding, options.stride
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
    seen = padded.unfold(1, kernel[0], down).unfold(2, kernel[1], right)
    return seen.permute(0, 1, 2, 4, 5, 3).reshape(-1, kernel[0] * kernel[1] * images.size(1))


def _gather(
    columns: Tensor, narrow: Sequence[int], wide: Sequence[int], kernel: Sequence[int], options: ConvOptions
) -> Tensor:
    """The adjoint: columns of (N, _, h, w) pixels added up to images (N, C, H, W)."""
    (n, _, h, w), (_, c, height, width) = narrow, wide
    (top, left), (down, right) = options.padding, options.stride
    taps = columns.view(n, h, w, *kernel, c)
    sums = columns.new_zeros((n, height + 2 * top, width + 2 * left, c), dtype=torch.float32)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            sums[:, i : i + down * (h - 1) + 1 : down, j : j + right * (w - 1) + 1 : right] += taps[:, :, :, i, j]
    return sums[:, top : top + height, left : left + width].to(columns.dtype).permute(0, 3, 1, 2)


def _rows(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).reshape(-1, images.size(1))


def _images(rows: Tensor, shape: Sequence[int]) -> Tensor:
    n, c, h, w = shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


class Product(torch.autograd.Function):
    """Convolution or transposed convolution; the backward by products, the forward where that is faster."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        ctx.options = options
        few = _pixels(input, weight, options) <= _MOST_PIXELS_FORWARD * weight.size(0)
        if not few or weight.numel() < _LARGE_WEIGHT:
            return reference.conv(input, weight, bias, options)
        kernel, shape = weight.shape[2:], reference.conv_shape(input.shape, weight.shape, options)
        matrix = _rows(weight).view(weight.size(0), -1)
        if options.transposed:
            output = _gather(_rows(input) @ matrix, input.shape, shape, kernel, options)
        else:
            output = _images(_columns(input, kernel, options) @ matrix.t(), shape)
        return output if bias is None else output + bias[:, None, None]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        options: ConvOptions = ctx.options
        want = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            given = [t for t, w in zip((input, weight, bias), want, strict=True) if w]
            again = reference.conv(input, weight, bias, options)
            found = iter(torch.autograd.grad(again, given, grad_output, create_graph=True))
            return *(next(found) if w else None for w in want), None
        kernel, transposed = weight.shape[2:], options.transposed
        grad_input = grad_weight = None
        narrow, wide = (input, grad_output) if transposed else (grad_output, input)
        if want[1] or (want[0] and transposed):
            columns = _columns(wide, kernel, options)
        if want[0]:
            matrix = _rows(weight).view(weight.size(0), -1)
            if transposed:
                grad_input = _images(columns @ matrix.t(), input.shape)
            else:
                grad_input = _gather(_rows(narrow) @ matrix, narrow.shape, wide.shape, kernel, options)
        if want[1]:
            # Turned first: the product then runs up to twice as fast.
            grad_weight = _images(_rows(narrow).t().contiguous() @ columns, weight.shape)
        return grad_input, grad_weight, grad_output.sum((0, 2, 3)) if want[2] else None, None
