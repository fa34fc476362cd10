"""Triton kernels of L1 distances.

Forward and tangent: bound by the n * n * b values that are written, up to c of some 20; a pair is computed once and
written to both its places, so that the result is exactly symmetric. Backward: each sample sums over all others, and
reads the incoming gradient as g[i, j] and as g[j, i]: bound by those bytes below c of 6 or so, by operations above.

A program is one warp whose lanes are features: every tensor has them innermost, one a lane, so that all have one layout
and none goes through shared memory. Hence the copies of m as (n, c, b).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern import _triton
from gankern._native import acc_dtype
from gankern.ops.minibatch_discrimination.parts import cut

__all__ = ["COMPILED_DISTANCE", "distance", "distance_backward", "distance_tangent", "sign"]


@triton.jit
def sign(d):
    """-1, 0 or 1, also 0 for a NaN, as torch.abs has it."""
    one = tl.where((d < 0) | (d > 0), 1.0, 0.0).to(d.dtype)
    if d.dtype == tl.float64:
        bits = one.to(tl.int64, bitcast=True) | (d.to(tl.int64, bitcast=True) & -0x8000000000000000)
    else:
        bits = one.to(tl.int32, bitcast=True) | (d.to(tl.int32, bitcast=True) & -0x80000000)
    return bits.to(d.dtype, bitcast=True)


# Sizes are not specialised: Triton would give a lane several features that it can read at once.
@triton.jit(do_not_specialize=["n", "b", "c"])
def _distance(
    m,
    tangent,
    output,
    n,
    b,
    c,
    T: tl.constexpr,
    A: tl.constexpr,
    TANGENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    columns = tl.cdiv(n, COLUMNS)
    rows = tl.cdiv(n, ROWS)
    program = tl.program_id(0)
    i0 = program // columns % rows * ROWS
    j0 = program % columns * COLUMNS
    if j0 + COLUMNS <= i0:  # written by the mirrored tile
        return
    i = (i0 + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    j = (j0 + tl.arange(0, COLUMNS)).to(tl.int64)[None, :, None]
    feature = (program // columns // rows * LANES + tl.arange(0, LANES))[None, None, :]
    # Samples beyond the last are others read again, and not written: masks cost registers.
    at_i = tl.minimum(i, n - 1) * c * b + feature
    at_j = tl.minimum(j, n - 1) * c * b + feature
    inside = feature < b
    total = tl.zeros([ROWS, COLUMNS, LANES], A)
    for _ in range(c):
        d = tl.load(m + at_i, inside, 0.0).to(A) - tl.load(m + at_j, inside, 0.0).to(A)
        if TANGENT:
            change = tl.load(tangent + at_i, inside, 0.0).to(A) - tl.load(tangent + at_j, inside, 0.0).to(A)
            total += sign(d) * change
        else:
            total += tl.abs(d)
        at_i += b
        at_j += b
    found = total.to(T)
    pair = inside & (i <= j) & (j < n)
    tl.store(output + (i * n + j) * b + feature, found, pair)
    tl.store(output + (j * n + i) * b + feature, found, pair & (i < j))


@triton.jit(do_not_specialize=["n", "b", "c", "size"])
def _distance_backward(
    grad_output,
    m,
    grads,
    n,
    b,
    c,
    size,
    A: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """A part of the sum over j; each part of `grads` is (n, c, b)."""
    chunks = tl.cdiv(c, DIMS)
    features = tl.cdiv(b, LANES)
    tiles = tl.cdiv(n, ROWS)
    program = tl.program_id(0)
    dim = (program % chunks * DIMS + tl.arange(0, DIMS))[:, None, None]
    feature = (program // chunks % features * LANES + tl.arange(0, LANES))[None, None, :]
    i = (program // chunks // features % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)[None, :, None]
    part = program // chunks // features // tiles
    begin = part * size
    end = tl.minimum(begin + size, n)
    # As above, also for the kernel dims.
    row = tl.minimum(i, n - 1)
    column = tl.minimum(dim, c - 1).to(tl.int64) * b + feature
    inside = feature < b
    n_b = b.to(tl.int64) * n
    x = tl.load(m + row * c * b + column, inside, 0.0).to(A)
    grad = tl.zeros([DIMS, ROWS, LANES], A)
    sample = m + begin * b.to(tl.int64) * c + column
    direct = grad_output + row * n_b + begin * b.to(tl.int64) + feature
    mirrored = grad_output + begin * n_b + row * b + feature
    for _ in range(begin, end):
        weight = tl.load(direct, inside, 0.0).to(A) + tl.load(mirrored, inside, 0.0).to(A)
        y = tl.load(sample, inside, 0.0).to(A)
        grad += weight * sign(x - y)
        sample += b.to(tl.int64) * c
        direct += b
        mirrored += n_b
    at = (i * c + dim) * b + feature
    tl.store(grads + part * n_b * c + at, grad, inside & (i < n) & (dim < c))


_LANES = 32
_DIMS = 8
_BLOCKS = 2112  # one-warp programs: sixteen for each multiprocessor of an H100
_LEAST = 16  # samples of a part


def _rows(dtype: torch.dtype) -> int:
    """Samples of a backward's program: as many as fit into its registers."""
    return 16 // acc_dtype(dtype).itemsize


def _tile(dtype: torch.dtype, tangent: bool) -> dict[str, int]:
    return {"ROWS": 4 if dtype == torch.float64 or tangent else 8, "COLUMNS": 4}


#: Every specialisation that may be launched.
COMPILED_DISTANCE = [
    _triton.Compiled(
        kernel, signature | {"n": "i32", "b": "i32", "c": "i32"}, constants | {"LANES": _LANES}, dtype, {"num_warps": 1}
    )
    for dtype in _triton.TYPES
    for kernel, signature, constants in [
        *(
            (_distance, {"m": "T*", "tangent": "T*", "output": "T*"}, {"TANGENT": t, **_tile(dtype, t)})
            for t in (False, True)
        ),
        (
            _distance_backward,
            {"grad_output": "T*", "m": "T*", "grads": "A*", "size": "i32"},
            {"DIMS": _DIMS, "ROWS": _rows(dtype)},
        ),
    ]
]


def _features_innermost(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous()


def _pairs(m: Tensor, tangent: Tensor | None) -> Tensor:
    n, b, c = m.shape
    output = torch.empty((n, n, b), dtype=m.dtype, device=m.device)
    if not output.numel():
        return output
    values = _features_innermost(m)
    tangents = values if tangent is None else _features_innermost(tangent)
    tile = _tile(m.dtype, tangent is not None)
    grid = (triton.cdiv(n, tile["ROWS"]) * triton.cdiv(n, tile["COLUMNS"]) * triton.cdiv(b, _LANES),)
    constants = _triton.types(m.dtype) | {"TANGENT": tangent is not None, **tile, "LANES": _LANES}
    arguments = (values, tangents, output, n, b, c)
    _triton.start(_distance, grid, *arguments, device=m.device, **constants, num_warps=1)
    return output


def distance(m: Tensor) -> Tensor:
    return _pairs(m, None)


def distance_tangent(tangent: Tensor, m: Tensor) -> Tensor:
    return _pairs(m, tangent)


def distance_backward(grad_output: Tensor, m: Tensor) -> Tensor:
    n, b, c = m.shape
    grad_m = torch.empty(m.shape, dtype=m.dtype, device=m.device)
    if not m.numel():
        return grad_m
    rows = _rows(m.dtype)
    blocks = triton.cdiv(n, rows) * triton.cdiv(b, _LANES) * triton.cdiv(c, _DIMS)
    count, size = cut(n, blocks, _BLOCKS, _LEAST)
    grads = torch.empty((count, n, c, b), dtype=acc_dtype(m.dtype), device=m.device)
    constants = {"A": _triton.types(m.dtype)["A"], "DIMS": _DIMS, "ROWS": rows, "LANES": _LANES}
    arguments = (grad_output.contiguous(), _features_innermost(m), grads, n, b, c, size)
    _triton.start(_distance_backward, (blocks * count,), *arguments, device=m.device, **constants, num_warps=1)
    return grad_m.copy_(total(grads).transpose(1, 2))


def total(parts: Tensor) -> Tensor:
    """The parts' sum, in their order."""
    return parts[0] if len(parts) == 1 else parts.sum(0)
