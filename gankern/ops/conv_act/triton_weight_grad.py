"""Triton kernel of a convolution's weight gradient: (channels) x (pixels) x (taps, channels).

The matrix units bound it where both sides have many channels; few results are made of parts of the pixels' sum, which
blocks of their own take, added up in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern import _triton
from gankern._native import acc_dtype
from gankern.ops.conv_act import gpu
from gankern.ops.conv_act.reference import ConvOptions


@triton.jit(
    do_not_specialize=[
        *("images", "narrow_h", "narrow_w", "wide_h", "wide_w", "kernel_h", "kernel_w", "share"),
        *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
    ]
)
def _weight_grad(
    narrow,
    wide,
    result,
    images: tl.int32,
    narrow_h: tl.int32,
    narrow_w: tl.int32,
    narrow_c: tl.int32,
    wide_h: tl.int32,
    wide_w: tl.int32,
    wide_c: tl.int32,
    kernel_h: tl.int32,
    kernel_w: tl.int32,
    stride_h: tl.int32,
    stride_w: tl.int32,
    padding_h: tl.int32,
    padding_w: tl.int32,
    dilation_h: tl.int32,
    dilation_w: tl.int32,
    share: tl.int32,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    columns = kernel_h * kernel_w * wide_c
    blocks = tl.cdiv(columns, BN)
    m = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    tap = n // wide_c
    down = tap // kernel_w * dilation_h - padding_h
    right = tap % kernel_w * dilation_w - padding_w
    at = (down * wide_w + right) * wide_c + n % wide_c
    pixels = images * narrow_h * narrow_w
    begin = tl.program_id(1) * share
    acc = tl.zeros((BM, BN), A)
    for p0 in range(begin, tl.minimum(begin + share, pixels), BK):
        p = p0 + tl.arange(0, BK)
        row = p // narrow_w
        y = row % narrow_h * stride_h
        x = p % narrow_w * stride_w
        # Offsets are from the first of these pixels and its image, so that 32 bits will do.
        mask = (m < narrow_c)[:, None] & (p < pixels)[None, :]
        from_narrow = narrow + tl.cast(p0, tl.int64) * narrow_c
        a = tl.load(from_narrow + tl.arange(0, BK)[None, :] * narrow_c + m[:, None], mask, 0.0)
        first = p0 // narrow_w // narrow_h
        from_wide = wide + tl.cast(first, tl.int64) * wide_h * wide_w * wide_c
        from_wide += (((row // narrow_h - first) * wide_h + y) * wide_w + x)[:, None] * wide_c + at[None, :]
        see_h = (y[:, None] + down[None, :] >= 0) & (y[:, None] + down[None, :] < wide_h)
        see_w = (x[:, None] + right[None, :] >= 0) & (x[:, None] + right[None, :] < wide_w)
        mask = (p < pixels)[:, None] & (n < columns)[None, :] & see_h & see_w
        acc = tl.dot(a, tl.load(from_wide, mask, 0.0), acc, input_precision=PRECISION, out_dtype=A)
    to = result + tl.program_id(1).to(tl.int64) * narrow_c * columns + m[:, None] * columns + n[None, :]
    tl.store(to, acc.to(result.dtype.element_ty), (m < narrow_c)[:, None] & (n < columns)[None, :])


@triton.jit
def _sum_parts(parts, result, count, size, T: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), A)
    for part in range(count):
        acc += tl.load(parts + tl.cast(part, tl.int64) * size + i, i < size, 0.0)
    tl.store(result + i, acc.to(T), i < size)


_BLOCK = 512


def _config(packed: bool, dtype: torch.dtype, precision: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants, and options of the launch; packed where the channels come in 16s on both sides."""
    constants = {"PRECISION": precision, "BM": 64, "BN": 64, "BK": 32 if packed else 16}
    if dtype == torch.float64:
        return constants | {"BM": 32, "BN": 32, "BK": 16}, {"num_warps": 4, "num_stages": 2}
    if dtype == torch.float32 and precision == "ieee":
        return constants | {"BK": 16}, {"num_warps": 8, "num_stages": 2}
    return constants, {"num_warps": 4, "num_stages": 3 if packed else 2}


_INTEGERS = list(_weight_grad.arg_names[3:19])

#: Every specialisation that may be launched.
COMPILED = [
    _triton.Compiled(
        _weight_grad,
        {"narrow": "T*", "wide": "T*", "result": f"{result}*", **dict.fromkeys(_INTEGERS, "i32")},
        _config(packed, dtype, precision)[0],
        dtype,
        _config(packed, dtype, precision)[1],
        ("narrow", "wide", "result", *(("narrow_c", "wide_c") if packed else ())),
    )
    for dtype, precision in [*((dtype, "ieee") for dtype in _triton.TYPES), (torch.float32, "tf32")]
    for packed in (True, False)
    for result in (("T", "A") if dtype.itemsize == 2 else ("T",))
] + [
    _triton.Compiled(
        _sum_parts, {"parts": "A*", "result": "T*", "count": "i32", "size": "i64"}, {"BLOCK": _BLOCK}, dtype
    )
    for dtype in _triton.TYPES
]


def weight_grad(narrow: Tensor, wide: Tensor, grad_weight: Tensor, options: ConvOptions) -> None:
    """Into a channels_last weight (channels of narrow, channels of wide, kH, kW)."""
    (images, channels, *narrow_size), (_, wide_channels, *wide_size) = narrow.shape, wide.shape
    kernel = grad_weight.shape[2:]
    pixels, size = images * narrow_size[0] * narrow_size[1], grad_weight.numel()
    packed = channels % 16 == wide_channels % 16 == 0
    constants, launch = _config(packed, narrow.dtype, "tf32" if gpu.allows_tf32(narrow.dtype) else "ieee")
    tiles = triton.cdiv(channels, constants["BM"]) * triton.cdiv(size // channels, constants["BN"])
    share, count = gpu.parts(pixels, tiles, constants["BK"])
    types = _triton.types(narrow.dtype)
    result = grad_weight
    if count > 1:
        result = torch.empty(count, size, dtype=acc_dtype(narrow.dtype), device=narrow.device)
    numbers = (images, *narrow_size, channels, *wide_size, wide_channels, *kernel)
    geometry = (*options.stride, *options.padding, *options.dilation)
    arguments = (narrow, wide, result, *numbers, *geometry, share)
    device = narrow.device
    _triton.start(_weight_grad, (tiles, count), *arguments, device=device, A=types["A"], **constants, **launch)
    if count > 1:
        blocks = (triton.cdiv(size, _BLOCK),)
        _triton.start(_sum_parts, blocks, result, grad_weight, count, size, device=device, **types, BLOCK=_BLOCK)
