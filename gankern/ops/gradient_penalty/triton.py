"""Triton kernels of a gradient penalty's elementwise ends.

Bound by bytes: interpolation reads two arrays and writes one, the tail reads the gradient twice, the second time mostly
from the L2 cache, and writes its cotangent. A program walks one chunk of one sample.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern import _triton
from gankern._layout import dense, like_layout, memory_format
from gankern._native import acc_dtype
from gankern._triton import refuse

__all__ = ["COMPILED", "interpolate", "refuse", "tail"]

# Partial sums, and samples, that the tail adds up at a time.
_SUMS = tl.constexpr(128)
_SAMPLES = tl.constexpr(16)


@triton.jit
def _interpolate(real, fake, alpha, points, size, chunks, T: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    sample = block // chunks
    i = block % chunks * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    i += sample * size
    share = tl.load(alpha + sample)
    r = tl.load(real + i, mask).to(A)
    f = tl.load(fake + i, mask).to(A)
    tl.store(points + i, (share * r + (1 - share) * f).to(T), mask)


@triton.jit
def _squares(grad, squares, size, chunks, T: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    i = block % chunks * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad + block // chunks * size + i, i < size, 0.0).to(tl.float64)
    tl.store(squares + block, tl.sum(g * g))


@triton.jit
def _excess(norm, target, ONE_SIDED: tl.constexpr):
    excess = norm - target
    return tl.where(excess < 0, 0.0, excess) if ONE_SIDED else excess


@triton.jit(do_not_specialize=["per_sample", "target"])
def _tail(
    grad,
    squares,
    cotangent,
    loss,
    n,
    size,
    chunks,
    per_sample,
    target,
    T: tl.constexpr,
    A: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    per_sample = per_sample.to(tl.int64).to(tl.float64, bitcast=True)
    target = target.to(tl.int64).to(tl.float64, bitcast=True)
    block = tl.program_id(0).to(tl.int64)
    sample = block // chunks
    k = tl.arange(0, _SUMS)
    sums = tl.zeros([_SUMS], tl.float64)
    for start in range(0, chunks, _SUMS):
        sums += tl.load(squares + sample * chunks + start + k, start + k < chunks, 0.0)
    slope = 2 * per_sample
    if not SQUARED:
        norm = tl.sqrt(tl.sum(sums))
        # The subgradient at norm 0 is 0.
        slope *= tl.where(norm == 0, 0.0, _excess(norm, target, ONE_SIDED) / tl.where(norm == 0, 1.0, norm))
    i = block % chunks * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    i += sample * size
    tl.store(cotangent + i, (tl.load(grad + i, mask).to(A) * slope.to(A)).to(T), mask)
    if block == 0:
        total = tl.zeros([_SAMPLES], tl.float64)
        for first in range(0, n, _SAMPLES):
            rows = first + tl.arange(0, _SAMPLES)
            square = tl.zeros([_SAMPLES], tl.float64)
            for start in range(0, chunks, _SUMS):
                there = (rows[:, None] < n) & (start + k[None, :] < chunks)
                at = rows.to(tl.int64)[:, None] * chunks + start + k[None, :]
                square += tl.sum(tl.load(squares + at, there, 0.0), 1)
            if not SQUARED:
                excess = _excess(tl.sqrt(square), target, ONE_SIDED)
                square = tl.where(rows < n, excess * excess, 0.0)
            total += square
        tl.store(loss, (tl.sum(total) * per_sample).to(A).to(T))


def _constants(dtype: torch.dtype) -> dict[str, Any]:
    # 16 values of float32 a thread. Products that were contracted with sums would not have the bits of torch's.
    return {"BLOCK": 2048 if dtype == torch.float64 else 4096, "num_warps": 8, "enable_fp_fusion": False}


_SIGNATURES = {
    _interpolate: {"real": "T*", "fake": "T*", "alpha": "A*", "points": "T*", "size": "i64", "chunks": "i64"},
    _squares: {"grad": "T*", "squares": "*fp64", "size": "i64", "chunks": "i64"},
    _tail: {
        **{"grad": "T*", "squares": "*fp64", "cotangent": "T*", "loss": "T*", "n": "i64", "size": "i64"},
        **{"chunks": "i64", "per_sample": "i64", "target": "i64"},
    },
}

#: Every specialisation that may be launched: kernel, types of its arguments, constants.
COMPILED = [
    _triton.compiled(kernel, _SIGNATURES[kernel], dtype, **constants, **_constants(dtype))
    for dtype in _triton.TYPES
    for kernel, constants in [
        (_interpolate, {}),
        (_squares, {}),
        *(
            (_tail, {"ONE_SIDED": o, "SQUARED": s})
            for o, s in itertools.product((False, True), repeat=2)
            if not (o and s)
        ),
    ]
]


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    real = dense(real)
    fake = like_layout(fake, real)
    alpha = alpha.to(acc_dtype(real.dtype)).contiguous()
    points = torch.empty_like(real, memory_format=memory_format(real))
    n = real.size(0)
    size = real.numel() // n
    constants = _constants(real.dtype)
    chunks = triton.cdiv(size, constants["BLOCK"])
    arguments = (real, fake, alpha, points, size, chunks)
    types = _triton.types(real.dtype)
    _triton.start(_interpolate, (n * chunks,), *arguments, device=real.device, **types, **constants)
    return points


def tail(grad: Tensor, weight: float, target: float, one_sided: bool, squared: bool) -> tuple[Tensor, Tensor]:
    grad = dense(grad)
    cotangent = torch.empty_like(grad, memory_format=memory_format(grad))
    loss = grad.new_empty(())
    n = grad.size(0)
    size = grad.numel() // n
    constants = _triton.types(grad.dtype) | _constants(grad.dtype)
    chunks = triton.cdiv(size, constants["BLOCK"])
    squares = torch.empty(n, chunks, dtype=torch.float64, device=grad.device)
    _triton.start(_squares, (n * chunks,), grad, squares, size, chunks, device=grad.device, **constants)
    numbers = _triton.bits(weight / n), _triton.bits(target)
    constants |= {"ONE_SIDED": one_sided and not squared, "SQUARED": squared}
    arguments = (grad, squares, cotangent, loss, n, size, chunks, *numbers)
    _triton.start(_tail, (n * chunks,), *arguments, device=grad.device, **constants)
    return loss, cotangent
