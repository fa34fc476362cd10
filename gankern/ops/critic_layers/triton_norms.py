"""Triton kernels of layer, group and instance norm: forward, backward and double backward.

Bound by bytes: each input is read twice, the second time as far as it may from the L2 cache, and each result written
once. Programs take tiles [channels, values]; see :mod:`gankern.ops.critic_layers.norms` for the passes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern import _triton
from gankern.ops.critic_layers.norms import SUMS, Given, Shape, Tile, Tiles

__all__ = ["COMPILED", "TritonNorms"]


@triton.jit
def _places(n, c, i, channels, inner, LAST: tl.constexpr):
    """Of the channels and values of a sample in memory."""
    if LAST:
        return n * channels * inner + c[:, None] + i[None, :] * channels
    else:
        return n * channels * inner + c[:, None] * inner + i[None, :]


@triton.jit
def _of_group(numbers, n, c, channels, groups, WHOLE: tl.constexpr):
    """A group's number, for each channel where there is more than one group."""
    if WHOLE:
        return tl.load(numbers + n)
    else:
        return tl.load(numbers + n * groups + c // (channels // groups), c < channels, 0.0)[:, None]


@triton.jit
def _put(entries, values, at, there, WHOLE: tl.constexpr):
    values = tl.sum(values, 1)
    if WHOLE:
        tl.store(entries + at, tl.sum(values, 0).to(tl.float64))
    else:
        tl.store(entries + at, values.to(tl.float64), there)


@triton.jit
def _sums(
    x,
    grad,
    tangent,
    weight,
    mean,
    rstd,
    entries,
    channels,
    inner,
    groups,
    channel_tiles,
    tiles,
    ORDER: tl.constexpr,
    WHOLE: tl.constexpr,
    LAST: tl.constexpr,
    BC: tl.constexpr,
    BL: tl.constexpr,
    T: tl.constexpr,
    A: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    n = program // tiles // channel_tiles
    c = program // tiles % channel_tiles * BC + tl.arange(0, BC)
    i = tile * BL + tl.arange(0, BL)
    there = c < channels
    mask = there[:, None] & (i < inner)[None, :]
    at = _places(n, c, i, channels, inner, LAST)
    K: tl.constexpr = 5 if ORDER == 2 else 2
    to = program * K if WHOLE else ((n * channels + c) * tiles + tile) * K
    values = tl.load(x + at, mask, 0.0).to(A)
    if ORDER == 0:
        # A value of the group's own keeps the sum of squares near the variance.
        group = channels // groups
        first = c // group * group
        own = n * channels * inner + (first if LAST else first * inner)
        d = tl.where(mask, values - tl.load(x + own, there, 0.0).to(A)[:, None], 0.0)
        _put(entries, d, to, there, WHOLE)
        _put(entries + 1, d * d, to, there, WHOLE)
    else:
        center = _of_group(mean, n, c, channels, groups, WHOLE).to(A)
        h = (values - center) * _of_group(rstd, n, c, channels, groups, WHOLE).to(A)
        u = tl.load(grad + at, mask, 0.0).to(A)
        if weight is not None:
            u *= tl.load(weight + c, there, 0.0).to(A)[:, None]
        if ORDER == 1:
            _put(entries, u, to, there, WHOLE)
            _put(entries + 1, u * h, to, there, WHOLE)
        else:
            t = tl.load(tangent + at, mask, 0.0).to(A)
            _put(entries, t, to, there, WHOLE)
            _put(entries + 1, t * h, to, there, WHOLE)
            _put(entries + 2, u, to, there, WHOLE)
            _put(entries + 3, u * h, to, there, WHOLE)
            _put(entries + 4, t * u, to, there, WHOLE)


@triton.jit
def _mean(entries, row, there, count, size, K: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr):
    total = tl.zeros([ROWS, ENTRIES], tl.float64)
    for start in range(0, count, ENTRIES):
        e = start + tl.arange(0, ENTRIES)
        at = (row[:, None] * count + e[None, :]) * K
        total += tl.load(entries + at, there[:, None] & (e < count)[None, :], 0.0)
    return tl.sum(total, 1) / size


@triton.jit(do_not_specialize=["eps"])
def _finish(
    entries,
    x,
    numbers,
    rows,
    count,
    channels,
    inner,
    groups,
    eps,
    ORDER: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    T: tl.constexpr,
    A: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    group = channels // groups
    size = group * inner
    K: tl.constexpr = 5 if ORDER == 2 else 2
    m0 = _mean(entries, row, there, count, size, K, ROWS, ENTRIES)
    m1 = _mean(entries + 1, row, there, count, size, K, ROWS, ENTRIES)
    if ORDER == 0:
        var = m1 - m0 * m0
        var = tl.where(var < 0, 0.0, var)  # a NaN stays
        first = row % groups * group
        own = row // groups * channels * inner + (first if LAST else first * inner)
        m0 += tl.load(x + own, there, 0.0).to(A)
        m1 = 1 / tl.sqrt(var + eps.to(tl.int64).to(tl.float64, bitcast=True))
    tl.store(numbers + row, m0.to(A), there)
    tl.store(numbers + rows + row, m1.to(A), there)
    if ORDER == 2:
        m2 = _mean(entries + 2, row, there, count, size, K, ROWS, ENTRIES)
        m3 = _mean(entries + 3, row, there, count, size, K, ROWS, ENTRIES)
        m4 = _mean(entries + 4, row, there, count, size, K, ROWS, ENTRIES)
        tl.store(numbers + 2 * rows + row, m2.to(A), there)
        tl.store(numbers + 3 * rows + row, m3.to(A), there)
        tl.store(numbers + 4 * rows + row, (m4 - m0 * m2 - m1 * m3).to(A), there)


@triton.jit
def _apply(
    x,
    grad,
    tangent,
    weight,
    bias,
    mean,
    rstd,
    numbers,
    first,
    second,
    parts,
    samples,
    channels,
    inner,
    groups,
    channel_tiles,
    tiles,
    each,
    ORDER: tl.constexpr,
    WHOLE: tl.constexpr,
    LAST: tl.constexpr,
    BC: tl.constexpr,
    BL: tl.constexpr,
    T: tl.constexpr,
    A: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    part = program // tiles // channel_tiles
    c = program // tiles % channel_tiles * BC + tl.arange(0, BC)
    i = tile * BL + tl.arange(0, BL)
    there = c < channels
    mask = there[:, None] & (i < inner)[None, :]
    rows = samples * groups
    grad_weight = tl.zeros([BC, BL], A)
    grad_bias = tl.zeros([BC, BL], A)
    for n in range(part * each, tl.minimum(part * each + each, samples)):
        at = _places(n, c, i, channels, inner, LAST)
        scale = _of_group(rstd, n, c, channels, groups, WHOLE).to(A)
        h = tl.load(x + at, mask, 0.0).to(A) - _of_group(mean, n, c, channels, groups, WHOLE).to(A)
        h *= scale
        if ORDER == 0:
            if weight is not None:
                h *= tl.load(weight + c, there, 0.0).to(A)[:, None]
            if bias is not None:
                h += tl.load(bias + c, there, 0.0).to(A)[:, None]
            tl.store(first + at, h.to(T), mask)
        else:
            g = tl.load(grad + at, mask, 0.0).to(A)
            u = g
            if weight is not None:
                w = tl.load(weight + c, there, 0.0).to(A)[:, None]
                u *= w
            m0 = _of_group(numbers, n, c, channels, groups, WHOLE)
            m1 = _of_group(numbers + rows, n, c, channels, groups, WHOLE)
            if ORDER == 1:
                tl.store(first + at, (scale * (u - m0 - h * m1)).to(T), mask)
                grad_weight += g * h
                grad_bias += g
            else:
                m3 = _of_group(numbers + 3 * rows, n, c, channels, groups, WHOLE)
                pv = tl.load(tangent + at, mask, 0.0).to(A) - m0 - h * m1
                pu = u - _of_group(numbers + 2 * rows, n, c, channels, groups, WHOLE) - h * m3
                curvature = _of_group(numbers + 4 * rows, n, c, channels, groups, WHOLE)
                tl.store(second + at, (-(scale * scale) * (curvature * h + m3 * pv + m1 * pu)).to(T), mask)
                pv *= scale
                grad_weight += g * pv
                if weight is not None:
                    pv *= w
                tl.store(first + at, pv.to(T), mask)
    if parts is not None:
        to = parts + (part * tiles + tile) * channels + c
        tl.store(to, tl.sum(grad_weight, 1), there)
        if ORDER == 1:
            count = (samples + each - 1) // each * tiles
            tl.store(to + count * channels, tl.sum(grad_bias, 1), there)


@triton.jit
def _add_parts(
    parts, weight, bias, count, channels, PARTS: tl.constexpr, BC: tl.constexpr, T: tl.constexpr, A: tl.constexpr
):
    c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    p = tl.arange(0, PARTS)
    there = c < channels
    total = tl.zeros([PARTS, BC], A)
    other = tl.zeros([PARTS, BC], A)
    for start in range(0, count, PARTS):
        at = parts + (start + p[:, None]).to(tl.int64) * channels + c[None, :]
        mask = (start + p < count)[:, None] & there[None, :]
        total += tl.load(at, mask, 0.0)
        if bias is not None:
            other += tl.load(at + channels.to(tl.int64) * count, mask, 0.0)
    tl.store(weight + c, tl.sum(total, 0).to(T), there)
    if bias is not None:
        tl.store(bias + c, tl.sum(other, 0).to(T), there)


_FINISH = {"ROWS": 8, "ENTRIES": 32, "num_warps": 4}
_ADD = {"PARTS": 64, "BC": 32, "num_warps": 4}


def _tile(shape: Shape, dtype: torch.dtype) -> Tile:
    # 16 bytes of float32 or less, twice, for each thread of four warps.
    size = 512 if dtype == torch.float64 else 1024
    if shape.last:
        channels = min(triton.next_power_of_2(shape.channels), size if shape.inner == 1 else 64)
        return Tile(channels, min(triton.next_power_of_2(shape.inner), size // channels))
    inner = min(triton.next_power_of_2(shape.inner), size)
    return Tile(min(triton.next_power_of_2(shape.channels), size // inner), inner)


class TritonNorms:
    """The launches that :mod:`gankern.ops.critic_layers.norms` asks for."""

    def tiles(self, given: Given, shape: Shape) -> Tiles:
        tile = _tile(shape, given.input.dtype)
        return Tiles(tile, tile)

    def sums(self, given: Given, shape: Shape, tile: Tile, entries: Tensor) -> None:
        x, tiles = given.input, tile.counts(shape)
        arguments = (x, given.grad_output, given.tangent, given.weight, given.mean, given.rstd, entries)
        grid = (shape.samples * tiles[0] * tiles[1],)
        constants = _constants(given, shape, tile)
        _triton.start(_sums, grid, *arguments, *shape[1:4], *tiles, device=x.device, **constants)

    def finish(self, given: Given, shape: Shape, entries: Tensor, eps: float, numbers: Tensor) -> None:
        count = entries.numel() // (shape.rows * entries.size(3))
        arguments = (entries, given.input, numbers, shape.rows, count, *shape[1:4], _triton.bits(eps))
        constants = _triton.types(given.input.dtype) | _FINISH | {"ORDER": given.order, "LAST": shape.last}
        grid = (triton.cdiv(shape.rows, _FINISH["ROWS"]),)
        _triton.start(_finish, grid, *arguments, device=given.input.device, **constants)

    def apply(
        self,
        given: Given,
        shape: Shape,
        tile: Tile,
        numbers: Tensor,
        bias: Tensor | None,
        results: list[Tensor],
        parts: Tensor | None,
        each: int,
    ) -> None:
        x, tiles = given.input, tile.counts(shape)
        mean, rstd = numbers.unbind() if given.order == 0 else (given.mean, given.rstd)
        outputs = (results[0], results[1] if given.order == 2 else None)
        arguments = (x, given.grad_output, given.tangent, given.weight, bias, mean, rstd, numbers, *outputs, parts)
        grid = (triton.cdiv(shape.samples, each) * tiles[0] * tiles[1],)
        constants = _constants(given, shape, tile)
        _triton.start(_apply, grid, *arguments, *shape[:4], *tiles, each, device=x.device, **constants)

    def add_parts(self, parts: Tensor, results: list[Tensor]) -> None:
        params, count, channels = parts.shape
        arguments = (parts, results[0], results[1] if params == 2 else None, count, channels)
        constants = _triton.types(results[0].dtype) | _ADD
        _triton.start(_add_parts, (triton.cdiv(channels, _ADD["BC"]),), *arguments, device=parts.device, **constants)


def _constants(given: Given, shape: Shape, tile: Tile) -> dict[str, Any]:
    return _triton.types(given.input.dtype) | _flags(given.order, shape, tile, given.input.dtype)


def _flags(order: int, shape: Shape, tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    warps = max(1, 4 * tile.channels * tile.inner // (512 if dtype == torch.float64 else 1024))
    constants = {"WHOLE": shape.whole, "LAST": shape.last, "BC": tile.channels, "BL": tile.inner}
    return {"ORDER": order, **constants, "num_warps": warps}


def _specialisations(dtype: torch.dtype, order: int, shape: Shape) -> list[_triton.Compiled]:
    tile = _tile(shape, dtype)
    sizes = dict.fromkeys(("samples", "channels", "inner", "groups", "channel_tiles", "tiles", "each"), "i32")
    inputs = {"x": "T*", "grad": "T*", "tangent": "T*", "weight": "T*", "bias": "T*", "mean": "A*", "rstd": "A*"}
    outputs = {"entries": "*fp64", "numbers": "A*", "first": "T*", "second": "T*", "parts": "A*"}
    absent = {0: ("grad", "tangent", "second", "parts"), 1: ("tangent", "second", "bias"), 2: ("bias",)}[order]
    constants: dict[str, Any] = dict.fromkeys(absent)
    flags = _flags(order, shape, tile, dtype)
    types = inputs | outputs | sizes
    return [
        _triton.compiled(kernel, types, dtype, **{k: v for k, v in constants.items() if k in kernel.arg_names}, **flags)
        for kernel in (_sums, _apply)
    ]


_LAYER = Shape(64, 131072, 1, 1, True)
_SHAPES = [_LAYER, Shape(64, 128, 1024, 128, False), Shape(64, 128, 1024, 32, True)]

#: One specialisation of every kind that may be launched; sizes of tiles follow the shape.
COMPILED = [
    *(
        found
        for dtype in _triton.TYPES
        for order in range(3)
        for shape in (_SHAPES if dtype == torch.float32 else [_LAYER])
        for found in _specialisations(dtype, order, shape)
    ),
    *(
        _triton.compiled(
            _finish,
            {"entries": "*fp64", "x": "T*", "numbers": "A*", "eps": "i64"}
            | dict.fromkeys(("rows", "count", "channels", "inner", "groups"), "i32"),
            dtype,
            **_FINISH,
            **{"ORDER": order, "LAST": True},
        )
        for dtype in (torch.float32, torch.float64)
        for order in range(len(SUMS))
    ),
    *(
        _triton.compiled(
            _add_parts,
            {"parts": "A*", "weight": "T*", "bias": "T*", "count": "i32", "channels": "i32"},
            dtype,
            **_ADD,
        )
        for dtype in _triton.TYPES
    ),
]
