"""Triton kernels of weight clipping: a launch for each tensor, since Triton has no structs to hand a list over in."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern import _triton
from gankern._triton import bits, refuse
from gankern.ops.weight_clip import reference
from gankern.ops.weight_clip.flat import all_alike, is_dense, split

__all__ = ["COMPILED", "clip_weights", "refuse", "rmsprop_clip"]


@triton.jit
def _number(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _number_or(bits, address):
    """A number, or the one on the device where there is an address; the other is 0."""
    there = address.to(tl.int64).to(tl.pointer_type(tl.float64))
    return _number(bits) + tl.load(there, address != 0, 0.0)


@triton.jit
def _clamp(x, c):
    x = tl.where(x < -c, -c, x)  # a NaN stays
    return tl.where(x > c, c, x)


@triton.jit(do_not_specialize=["c"])
def _clip_weights(param, size, c, T: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    tl.store(param + i, _clamp(tl.load(param + i, mask).to(A), _number(c).to(A)).to(T), mask)


_NUMBERS = ("lr", "lr_at", "alpha", "eps", "weight_decay", "momentum", "sign", "c", "c_at")


@triton.jit(do_not_specialize=_NUMBERS)
def _rmsprop_clip(
    param,
    grad,
    square_avg,
    grad_avg,
    buffer,
    size,
    lr,
    lr_at,
    alpha,
    eps,
    weight_decay,
    momentum,
    sign,
    c,
    c_at,
    T: tl.constexpr,
    A: tl.constexpr,
    CENTERED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    kept = _number(alpha).to(A)
    rest = (1 - _number(alpha)).to(A)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    p = tl.load(param + i, mask).to(A)
    d = tl.load(grad + i, mask).to(A) * _number(sign).to(A) + p * _number(weight_decay).to(A)
    v = tl.load(square_avg + i, mask, 1.0).to(A) * kept + d * d * rest
    tl.store(square_avg + i, v.to(T), mask)
    if CENTERED:
        mean = tl.load(grad_avg + i, mask).to(A) * kept + d * rest
        tl.store(grad_avg + i, mean.to(T), mask)
        v -= mean * mean
    update = d / (tl.sqrt(v) + _number(eps).to(A))
    if MOMENTUM:
        update += tl.load(buffer + i, mask).to(A) * _number(momentum).to(A)
        tl.store(buffer + i, update.to(T), mask)
    p -= update * _number_or(lr, lr_at).to(A)
    tl.store(param + i, _clamp(p, _number_or(c, c_at).to(A)).to(T), mask)


# Bytes of each array at a time: a thread's registers hold as much of five of them.
_BYTES = 2048

_ARRAYS = ("param", "grad", "square_avg", "grad_avg", "buffer")

#: Every specialisation that may be launched on arrays that begin at multiples of 16 bytes, or at others.
COMPILED = [
    _triton.Compiled(
        kernel,
        dict.fromkeys(arrays, "T*") | {"size": "i64"} | dict.fromkeys(numbers, "i64"),
        constants | {"BLOCK": _BYTES // dtype.itemsize},
        dtype,
        divisible=divisible,
    )
    for dtype in _triton.TYPES
    for kernel, arrays, numbers, constants in [
        (_clip_weights, _ARRAYS[:1], ("c",), {}),
        *(
            (_rmsprop_clip, _ARRAYS, _NUMBERS, {"CENTERED": c, "MOMENTUM": m})
            for c, m in itertools.product((False, True), repeat=2)
        ),
    ]
    for divisible in ((), (*arrays, "size"))
]


def _start(kernel: Any, arrays: tuple[Tensor, ...], *numbers: int, **constants: Any) -> None:
    first = arrays[0]
    block = _BYTES // first.element_size()
    constants |= _triton.types(first.dtype) | {"BLOCK": block}
    size = first.numel()
    _triton.start(kernel, (triton.cdiv(size, block),), *arrays, size, *numbers, device=first.device, **constants)


def clip_weights(params: list[Tensor], c: float) -> None:
    dense = [p for p in params if is_dense(p)]
    if len(dense) < len(params):
        reference.clip_weights([p for p in params if not is_dense(p)], c)
    for param in dense:
        _start(_clip_weights, (param,), bits(c))


def _given(value: float | Tensor) -> tuple[tuple[int, int], Any]:
    """A number and its address on the device, one of them 0; and what is to be kept there."""
    if not isinstance(value, Tensor):
        return (bits(value), 0), None
    there = value.to(torch.float64)
    return (0, there.data_ptr()), there


def rmsprop_clip(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: float | Tensor,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    clip: float | Tensor | None,
) -> None:
    lists: list[Any] = [params, grads, square_avgs, grad_avgs, momentum_buffers]
    options: tuple[Any, ...] = (lr, alpha, eps, weight_decay, momentum, maximize, clip)
    if not all_alike(lists):
        lists, others = split(lists)
        reference.rmsprop_clip(*others, *options)
    (rate, rate_there), (bound, bound_there) = _given(lr), _given(math.inf if clip is None else clip)
    numbers = (bits(alpha), bits(eps), bits(weight_decay), bits(momentum), bits(-1.0 if maximize else 1.0))
    centered, with_momentum = bool(lists[3]), bool(lists[4])
    params = lists[0]
    for arrays in zip(*(tensors or params for tensors in lists), strict=True):
        _start(_rmsprop_clip, arrays, *rate, *numbers, *bound, CENTERED=centered, MOMENTUM=with_momentum)
    del rate_there, bound_there
