"""Triton kernels of convolutions, transposed or not, as implicit matrix products of pixels by taps.

From about 32 channels on each side the matrix units bound them, below that the bytes of the images. A transposed
convolution is one product for each phase of its stride, whose pixels see the same taps: no zero is inserted.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern import _triton
from gankern._native import ACTIVATIONS, acc_dtype
from gankern._triton import refuse
from gankern.ops.conv_act import gpu
from gankern.ops.conv_act.gpu import Finish, Problem, channels_last
from gankern.ops.conv_act.reference import activate_backward
from gankern.ops.conv_act.triton_weight_grad import COMPILED as COMPILED_WEIGHT_GRAD
from gankern.ops.conv_act.triton_weight_grad import weight_grad

__all__ = [
    "COMPILED",
    "activate_backward",
    "channels_last",
    "conv",
    "conv_as_stock",
    "conv_input_grad",
    "conv_statistics",
    "conv_weight_grad",
    "refuse",
]


@triton.jit
def _first_tap(origin, offset, result_step, dilation, tap_step, kernel):
    """The first tap that a phase's pixels see, and how many of them, `tap_step` apart."""
    first = kernel
    for i in range(tap_step):
        first = tl.where((origin + offset - dilation * i) % result_step == 0, tl.minimum(first, i), first)
    return first, (kernel - first + tap_step - 1) // tap_step


@triton.jit
def _tanh(z):
    size = tl.abs(z)
    square = z * z
    # Near zero a rational function (Moshier's Cephes): the quotient of exponentials would cancel.
    top = (-9.64399179425052238628e-1 * square - 9.92877231001918586564e1) * square - 1.61468768441708447952e3
    bottom = (
        (square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3
    ) * square + 4.84406305325125486048e3
    rest = tl.exp(-2 * size)
    large = (1 - rest) / (1 + rest)
    return tl.where(size < 0.625, z + z * square * (top / bottom), tl.where(z < 0, -large, large))


@triton.jit(
    do_not_specialize=[
        *("images", "source_h", "source_w", "result_h", "result_w", "kernel_h", "kernel_w"),
        *("result_step_h", "result_step_w", "source_step_h", "source_step_w", "offset_h", "offset_w"),
        *("dilation_h", "dilation_w", "tap_step_h", "tap_step_w", "reach_h", "reach_w", "activation", "flags"),
    ]
)
def _conv(
    source,
    weight,
    result,
    scale,
    shift,
    activated,
    sums,
    slope: tl.float64,
    images: tl.int32,
    source_h: tl.int32,
    source_w: tl.int32,
    source_c: tl.int32,
    result_h: tl.int32,
    result_w: tl.int32,
    result_c: tl.int32,
    kernel_h: tl.int32,
    kernel_w: tl.int32,
    result_step_h: tl.int32,
    result_step_w: tl.int32,
    source_step_h: tl.int32,
    source_step_w: tl.int32,
    offset_h: tl.int32,
    offset_w: tl.int32,
    dilation_h: tl.int32,
    dilation_w: tl.int32,
    tap_step_h: tl.int32,
    tap_step_w: tl.int32,
    reach_h: tl.int32,
    reach_w: tl.int32,
    activation: tl.int32,
    flags: tl.int32,
    T: tl.constexpr,
    A: tl.constexpr,
    WIDENS: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # Neighbours share the images: channels vary fastest, then phases.
    tile = tl.program_id(0)
    blocks = tl.cdiv(result_c, BN)
    n = tile % blocks * BN + tl.arange(0, BN)
    tile = tile // blocks
    phases = result_step_h * result_step_w
    origin_h = tile % phases // result_step_w
    origin_w = tile % result_step_w
    grid_h = tl.cdiv(result_h - origin_h, result_step_h)
    grid_w = tl.cdiv(result_w - origin_w, result_step_w)
    first_h, taps_h = _first_tap(origin_h, offset_h, result_step_h, dilation_h, tap_step_h, kernel_h)
    first_w, taps_w = _first_tap(origin_w, offset_w, result_step_w, dilation_w, tap_step_w, kernel_w)

    # Offsets are from the tile's first image, so that 32 bits will do.
    m = tile // phases * BM + tl.arange(0, BM)
    image = m // (grid_h * grid_w)
    first = tile // phases * BM // (grid_h * grid_w)
    source += first.to(tl.int64) * source_h * source_w * source_c
    row = m // grid_w % grid_h
    column = m % grid_w
    inside = image < images
    y = row * source_step_h + (origin_h + offset_h - dilation_h * first_h) // result_step_h
    x = column * source_step_w + (origin_w + offset_w - dilation_w * first_w) // result_step_w
    at = (((image - first) * source_h + y) * source_w + x) * source_c
    # The weight is (narrow channels, taps, wide channels) in memory.
    weight_w = result_c if WIDENS else source_c
    weight_h = kernel_w * weight_w
    weight_source = kernel_h * weight_h if WIDENS else 1
    weight_result = 1 if WIDENS else kernel_h * weight_h
    weight += first_h * weight_h + first_w * weight_w

    acc = tl.zeros((BM, BN), A)
    if FLAT:
        for k0 in range(0, taps_h * taps_w * source_c, BK):
            k = k0 + tl.arange(0, BK)
            c = k % source_c
            tap = k // source_c
            i = tap // taps_w
            j = tap % taps_w
            down = i * reach_h
            right = j * reach_w
            see_h = (y[:, None] + down[None, :] >= 0) & (y[:, None] + down[None, :] < source_h)
            see_w = (x[:, None] + right[None, :] >= 0) & (x[:, None] + right[None, :] < source_w)
            step = (down * source_w + right) * source_c + c
            mask = inside[:, None] & see_h & see_w & (i < taps_h)[None, :]
            a = tl.load(source + at[:, None] + step[None, :], mask, 0.0)
            row_at = c * weight_source + i * tap_step_h * weight_h + j * tap_step_w * weight_w
            mask = (i < taps_h)[:, None] & (n < result_c)[None, :]
            b = tl.load(weight + row_at[:, None] + n[None, :] * weight_result, mask, 0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=A)
    else:
        chunks = tl.cdiv(source_c, BK)
        for step in range(taps_h * taps_w * chunks):
            tap = step // chunks
            c = step % chunks * BK + tl.arange(0, BK)
            i = tap // taps_w
            j = tap % taps_w
            down = i * reach_h
            right = j * reach_w
            see = inside & (y + down >= 0) & (y + down < source_h) & (x + right >= 0) & (x + right < source_w)
            from_source = source + (down * source_w + right) * source_c
            a = tl.load(from_source + at[:, None] + c[None, :], see[:, None] & (c < source_c)[None, :], 0.0)
            from_weight = weight + (i * tap_step_h * weight_h + j * tap_step_w * weight_w)
            from_weight += c[:, None] * weight_source + n[None, :] * weight_result
            b = tl.load(from_weight, (c < source_c)[:, None] & (n < result_c)[None, :], 0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=A)

    if flags & 1:
        acc = acc * tl.load(scale + n, n < result_c, 0.0)[None, :]
    if flags & 2:
        acc = acc + tl.load(shift + n, n < result_c, 0.0)[None, :]
    if flags & 4:
        # Squares are of the difference to the tile's mean: they lose no digits to a large one.
        count = tl.sum(inside.to(A), 0)
        mean = tl.sum(tl.where(inside[:, None], acc, 0.0), 0) / tl.maximum(count, 1)
        off = tl.where(inside[:, None], acc - mean[None, :], 0.0)
        rest = tl.sum(off, 0).to(tl.float64)
        squares = tl.sum(off * off, 0).to(tl.float64)
        mean = mean.to(tl.float64)
        total = count.to(tl.float64) * mean
        part = sums + tile.to(tl.int64) * 2 * result_c + n
        tl.store(part, rest + total, n < result_c)
        tl.store(part + result_c, squares + mean * (2 * rest + total), n < result_c)
    result += first.to(tl.int64) * result_h * result_w * result_c
    activated += first.to(tl.int64) * result_h * result_w * result_c
    to = ((image - first) * result_h + origin_h + row * result_step_h) * result_w + origin_w + column * result_step_w
    to = to[:, None] * result_c + n[None, :]
    mask = inside[:, None] & (n < result_c)[None, :]
    below = tl.full((), slope, A)
    if flags & 8:
        output = tl.load(activated + to, mask, 0.0).to(A)
        if activation == 1:
            acc = tl.where(output <= 0, 0.0, acc)
        elif activation == 2:
            acc = tl.where(output > 0, acc, acc * below)
        elif activation == 3:
            acc = acc * (1 - output * output)
    else:
        if activation == 1:
            acc = tl.where(acc <= 0, 0.0, acc)
        elif activation == 2:
            acc = tl.where(acc > 0, acc, acc * below)
        elif activation == 3:
            acc = _tanh(acc)
    tl.store(result + to, acc.to(T), mask)


# With channels that come in 16s on both sides; to few channels; else with taps and channels flattened.
_KINDS = ("packed", "few", "flat")


def _config(kind: str, dtype: torch.dtype, precision: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants, and options of the launch, with which no register spills."""
    constants = {"FLAT": kind == "flat", "PRECISION": precision}
    if dtype == torch.float64:
        blocks, warps, stages = (32, 32, 16), 4 if kind == "few" else 8, 2
    elif precision == "ieee" and dtype == torch.float32:
        blocks, warps, stages = (128, 64, 16) if kind == "packed" else (64, 32, 16), 8, 2
    elif kind == "packed":
        blocks, warps, stages = (128, 64, 32), 8 if dtype == torch.float32 else 4, 3
    else:
        blocks, warps, stages = (64, 32, 16) if dtype == torch.float32 else (64, 64, 32), 4, 2
    m, n, k = blocks
    return constants | {"BM": m, "BN": 16 if kind == "few" else n, "BK": k}, {"num_warps": warps, "num_stages": stages}


_INTEGERS = [name for name in _conv.arg_names[8:] if not name.isupper()]
_SIGNATURE = {
    **dict.fromkeys(("source", "weight", "result", "activated"), "T*"),
    **dict.fromkeys(("scale", "shift"), "A*"),
    "sums": "*fp64",
    "slope": "fp64",
    **dict.fromkeys(_INTEGERS, "i32"),
}
_POINTERS = tuple(_conv.arg_names[:7])

#: Every specialisation that may be launched.
COMPILED = [
    _triton.Compiled(
        _conv,
        _SIGNATURE,
        {"WIDENS": widens, **_config(kind, dtype, precision)[0]},
        dtype,
        _config(kind, dtype, precision)[1],
        _POINTERS + {"packed": ("source_c", "result_c"), "few": ("source_c",), "flat": ()}[kind],
    )
    for dtype, precision in [*((dtype, "ieee") for dtype in _triton.TYPES), (torch.float32, "tf32")]
    for kind in _KINDS
    for widens in (False, True)
] + COMPILED_WEIGHT_GRAD


def _convolve(what: Problem, source: Tensor, weight: Tensor, result: Tensor, finish: Finish) -> Tensor | None:
    channels = what.result[2]
    kind = "flat" if what.source[2] % 16 else "few" if channels <= 16 else "flat" if channels % 16 else "packed"
    constants, launch = _config(kind, source.dtype, "tf32" if gpu.allows_tf32(source.dtype) else "ieee")
    phases, pixels = what.grid()
    rows = phases * triton.cdiv(pixels, constants["BM"])
    nothing = torch.empty(0, dtype=acc_dtype(source.dtype), device=source.device)
    sums = None
    if finish.statistics:
        sums = torch.empty(rows, 2, channels, dtype=torch.float64, device=source.device)
    given = (finish.scale, finish.shift, sums, finish.activated)
    _triton.start(
        _conv,
        (rows * triton.cdiv(channels, constants["BN"]),),
        source,
        weight,
        result,
        *(nothing if t is None else t for t in given[:2]),
        result if finish.activated is None else finish.activated,
        nothing.double() if sums is None else sums,
        finish.negative_slope,
        *what.numbers(),
        ACTIVATIONS[finish.activation],
        sum(1 << i for i, t in enumerate(given) if t is not None),
        device=source.device,
        **_triton.types(source.dtype),
        WIDENS=what.widens,
        **constants,
        **launch,
    )
    return sums


_kernels = gpu.Kernels(_convolve, weight_grad)
conv = conv_as_stock = _kernels.conv
conv_statistics = _kernels.conv_statistics
conv_input_grad = _kernels.conv_input_grad
conv_weight_grad = _kernels.conv_weight_grad
