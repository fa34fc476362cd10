"""Triton kernels of weight clipping: one launch for a whole list."""

from __future__ import annotations

import itertools
import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gankern import _triton
from gankern._triton import refuse
from gankern.ops.weight_clip import reference
from gankern.ops.weight_clip.flat import all_alike, is_dense, split
from gankern.ops.weight_clip.table import CHUNK, numbers, table

__all__ = ["COMPILED", "clip_weights", "refuse", "rmsprop_clip"]


@triton.jit
def _pointer(addresses, tensor, T: tl.constexpr):
    return tl.load(addresses + tensor).to(tl.pointer_type(T))


@triton.jit
def _clamp(x, c):
    x = tl.where(x < -c, -c, x)  # a NaN stays
    return tl.where(x > c, c, x)


@triton.jit
def _clip_weights(
    chunks, addresses, sizes, c, T: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    tensor = tl.load(chunks + 2 * block)
    begin = tl.load(chunks + 2 * block + 1)
    size = tl.load(sizes + tensor)
    param = _pointer(addresses, tensor, T)
    bound = tl.load(c).to(A)
    for start in range(0, CHUNK, BLOCK):
        i = begin + start + tl.arange(0, BLOCK)
        tl.store(param + i, _clamp(tl.load(param + i, i < size).to(A), bound).to(T), i < size)


@triton.jit
def _rmsprop_clip(
    chunks,
    addresses,
    sizes,
    count,
    numbers,
    T: tl.constexpr,
    A: tl.constexpr,
    CENTERED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lr = tl.load(numbers).to(A)
    alpha = tl.load(numbers + 1).to(A)
    rest = tl.load(numbers + 2).to(A)
    eps = tl.load(numbers + 3).to(A)
    weight_decay = tl.load(numbers + 4).to(A)
    momentum = tl.load(numbers + 5).to(A)
    sign = tl.load(numbers + 6).to(A)
    c = tl.load(numbers + 7).to(A)
    block = tl.program_id(0)
    tensor = tl.load(chunks + 2 * block)
    begin = tl.load(chunks + 2 * block + 1)
    size = tl.load(sizes + tensor)
    param = _pointer(addresses, tensor, T)
    grad = _pointer(addresses + count, tensor, T)
    square_avg = _pointer(addresses + 2 * count, tensor, T)
    for start in range(0, CHUNK, BLOCK):
        i = begin + start + tl.arange(0, BLOCK)
        mask = i < size
        p = tl.load(param + i, mask).to(A)
        d = tl.load(grad + i, mask).to(A) * sign + p * weight_decay
        v = tl.load(square_avg + i, mask, 1.0).to(A) * alpha + d * d * rest
        tl.store(square_avg + i, v.to(T), mask)
        if CENTERED:
            grad_avg = _pointer(addresses + 3 * count, tensor, T)
            mean = tl.load(grad_avg + i, mask).to(A) * alpha + d * rest
            tl.store(grad_avg + i, mean.to(T), mask)
            v -= mean * mean
        update = d / (tl.sqrt(v) + eps)
        if MOMENTUM:
            buffer = _pointer(addresses + (3 + CENTERED) * count, tensor, T)
            update += tl.load(buffer + i, mask).to(A) * momentum
            tl.store(buffer + i, update.to(T), mask)
        tl.store(param + i, _clamp(p - update * lr, c).to(T), mask)


# Bytes of each array at a time: a thread's registers hold as much of five of them.
_BYTES = 2048

_SIGNATURE = {"chunks": "*i64", "addresses": "*i64", "sizes": "*i64"}

#: Every specialisation that may be launched: kernel, types of its arguments, constants.
COMPILED = [
    _triton.Compiled(kernel, _SIGNATURE | types, constants | {"CHUNK": CHUNK, "BLOCK": _BYTES // dtype.itemsize}, dtype)
    for dtype in _triton.TYPES
    for kernel, types, constants in [
        (_clip_weights, {"c": "*fp64"}, {}),
        *(
            (_rmsprop_clip, {"count": "i32", "numbers": "*fp64"}, {"CENTERED": c, "MOMENTUM": m})
            for c, m in itertools.product((False, True), repeat=2)
        ),
    ]
]


def _constants(tensor: Tensor) -> dict[str, Any]:
    return _triton.types(tensor.dtype) | {"CHUNK": CHUNK, "BLOCK": _BYTES // tensor.element_size()}


def clip_weights(params: list[Tensor], c: float) -> None:
    dense = [p for p in params if is_dense(p) and p.numel()]
    if len(dense) < len(params):
        reference.clip_weights([p for p in params if not is_dense(p)], c)
    if dense:
        found = table([dense])
        grid = (len(found.chunks),)
        _clip_weights[grid](
            found.chunks, found.addresses, found.sizes, numbers(dense[0].device, c), **_constants(dense[0])
        )


def rmsprop_clip(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    clip: float | None,
) -> None:
    lists: list[Any] = [params, grads, square_avgs, grad_avgs, momentum_buffers]
    options: tuple[Any, ...] = (lr, alpha, eps, weight_decay, momentum, maximize, clip)
    if not all_alike(lists):
        lists, others = split(lists)
        reference.rmsprop_clip(*others, *options)
    if not lists[0]:
        return
    found = table([tensors for tensors in lists if tensors])
    device, given = lists[0][0].device, [lr, math.inf if clip is None else clip]
    known = [0.0 if isinstance(v, Tensor) else v for v in given]
    values = numbers(device, known[0], alpha, 1 - alpha, eps, weight_decay, momentum, -1 if maximize else 1, known[1])
    if any(isinstance(v, Tensor) for v in given):
        # On the device already: they are read there.
        values = values.clone()
        for at, value in zip((0, 7), given, strict=True):
            if isinstance(value, Tensor):
                values[at : at + 1].copy_(value.view(1))
    _rmsprop_clip[(len(found.chunks),)](
        found.chunks,
        found.addresses,
        found.sizes,
        len(lists[0]),
        values,
        **_constants(lists[0][0]),
        CENTERED=bool(lists[3]),
        MOMENTUM=bool(lists[4]),
    )
