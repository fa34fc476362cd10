"""Triton kernels of minibatch discrimination; those of L1 distances are in triton_distance.py.

Bound by operations: n * n * b pairs of c elements, each pair from both of its sides, so that a program owns its outputs
and needs no atomics. A program is one warp and has some samples i of one feature in registers, one lane each; samples j
pass by one at a time, their values the same for all lanes. Rows come from a copy of m with the samples innermost, which
makes Triton give each lane a sample with all its kernel dims, and their sums no exchange between lanes; results are
laid out like it.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from gankern import _triton
from gankern._native import acc_dtype
from gankern._triton import refuse
from gankern.ops.minibatch_discrimination.parts import cut
from gankern.ops.minibatch_discrimination.triton_distance import (
    COMPILED_DISTANCE,
    distance,
    distance_backward,
    distance_tangent,
    sign,
    total,
)

__all__ = [
    "COMPILED",
    "distance",
    "distance_backward",
    "distance_tangent",
    "features",
    "features_backward",
    "features_double_backward",
    "refuse",
]


# Sizes are not specialised: Triton would read several samples of a row at once and give a lane several of them.
@triton.jit(do_not_specialize=["n", "b", "c", "parts", "size", "include_self"])
def _features(
    m,
    rows,
    tangents,
    tangent_rows,
    grad_output,
    grad_rows,
    sums,
    grads,
    n,
    b,
    c,
    parts,
    size,
    include_self,
    A: tl.constexpr,
    ORDER: tl.constexpr,
    WHOLE: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A part of the sums over j, for ROWS samples i of a feature; of its gradient DIMS kernel dims.

    c is a multiple of DIMS. `rows` is m as (b, c, n), as are `tangent_rows` and each part of `grads`; `grad_rows` and
    each part of `sums` are (b, n).
    """
    tiles = tl.cdiv(n, ROWS)
    program = tl.program_id(0)
    i = program % tiles * ROWS + tl.arange(0, ROWS)
    feature = (program // tiles % b).to(tl.int64)
    part = (program // tiles // b % parts).to(tl.int64)
    own = program // tiles // b // parts * DIMS
    begin = (part * size).to(tl.int32)
    end = tl.minimum(begin + size, n)
    inside = i < n
    mask = inside[None, :]
    dim = tl.arange(0, DIMS)
    at = (feature * c + own + dim[:, None]) * n + i[None, :]

    x = tl.load(rows + at, mask, 0.0).to(A)
    sample = m + (begin * b.to(tl.int64) + feature) * c
    if ORDER > 0:
        g = tl.load(grad_rows + feature * n + i, inside, 0.0).to(A)
        grad_sample = grad_output + begin * b.to(tl.int64) + feature
        grad = tl.zeros([DIMS, ROWS], A)
    if ORDER == 2:
        v = tl.load(tangent_rows + at, mask, 0.0).to(A)
        tangent_sample = tangents + (begin * b.to(tl.int64) + feature) * c
    total = tl.zeros([ROWS], tl.float64)
    for j0 in range(begin, end, 32):
        tile = tl.zeros([ROWS], A)
        for j in range(j0, tl.minimum(j0 + 32, end)):
            y = tl.load(sample + own + dim).to(A)
            if WHOLE:
                d = x - y[:, None]
                distance = tl.sum(tl.abs(d), 0)
                if ORDER == 2:
                    u = tl.load(tangent_sample + dim).to(A)
                    change = tl.sum(sign(d) * (v - u[:, None]), 0)
            else:
                distance = tl.zeros([ROWS], A)
                change = tl.zeros([ROWS], A)
                for c0 in range(0, c, DIMS):
                    at_c0 = (feature * c + c0 + dim[:, None]) * n + i[None, :]
                    y_c0 = tl.load(sample + c0 + dim).to(A)
                    d = tl.load(rows + at_c0, mask, 0.0).to(A) - y_c0[:, None]
                    distance += tl.sum(tl.abs(d), 0)
                    if ORDER == 2:
                        u = tl.load(tangent_sample + c0 + dim).to(A)
                        v_c0 = tl.load(tangent_rows + at_c0, mask, 0.0).to(A)
                        change += tl.sum(sign(d) * (v_c0 - u[:, None]), 0)
            e = tl.exp(-distance)
            if ORDER == 2:
                e *= change
                tangent_sample += b.to(tl.int64) * c
            # A sample's distance to itself may be inf - inf.
            if ORDER != 1:
                tile += tl.where(i == j, 0.0, e)
            if ORDER > 0:
                weight = tl.where(i == j, 0.0, (g + tl.load(grad_sample).to(A)) * e)
                grad += weight[None, :] * sign(x - y[:, None])
                grad_sample += b
            sample += b.to(tl.int64) * c
        if ORDER != 1:
            total += tile.to(tl.float64)

    if ORDER == 0:
        total += tl.where(part == 0, include_self, 0)
    if ORDER == 2:
        total = -total
    if ORDER != 1:
        tl.store(sums + (part * b + feature) * n + i, total.to(A), inside & (own == 0))
    if ORDER > 0:
        if ORDER == 1:
            grad = -grad
        tl.store(grads + part * b * c * n + at, grad, mask)


_BLOCKS = 2112  # one-warp programs: sixteen for each multiprocessor of an H100
_LEAST = 16  # samples of a part


def _constants(order: int, dtype: torch.dtype, c: int) -> dict[str, Any]:
    """Values of the kernel's macros for c kernel dims; as many samples of a program as fit into its registers."""
    size = acc_dtype(dtype).itemsize
    whole = c <= 16
    dims = 8 if c <= 8 or (not whole and (order == 2 or size == 8)) else 16
    rows = 64 if dims * size * (order + 1) <= 64 else 32
    return {"ORDER": order, "WHOLE": whole, "DIMS": dims, "ROWS": rows}


_OPTIONS = {"num_warps": 1}
_SIGNATURE = {
    **dict.fromkeys(("m", "rows", "tangents", "tangent_rows", "grad_output", "grad_rows"), "T*"),
    **dict.fromkeys(("sums", "grads"), "A*"),
    **dict.fromkeys(("n", "b", "c", "parts", "size", "include_self"), "i32"),
}

#: Every specialisation that may be launched: kernel, types of its arguments, constants.
COMPILED = [
    *(
        _triton.Compiled(_features, _SIGNATURE, _constants(order, dtype, c), dtype, _OPTIONS)
        for dtype in _triton.TYPES
        for order, c in itertools.product(range(3), (8, 16, 17))
    ),
    *COMPILED_DISTANCE,
]


def _samples_innermost(tensor: Tensor) -> Tensor:
    return tensor.movedim(0, -1).contiguous()


def _run(order: int, m: Tensor, grad_output: Tensor, cotangent: Tensor, include_self: bool = False) -> list[Tensor]:
    """Sums, as (n, b), and gradient, as (n, b, c), in the type of the arithmetic; what an order has not is empty."""
    n, b, c = m.shape
    constants = _constants(order, m.dtype, c)
    dims = constants["DIMS"]
    chunks = max(1, triton.cdiv(c, dims))
    if c < chunks * dims:
        m = pad(m, (0, chunks * dims - c))
        cotangent = pad(cotangent, (0, chunks * dims - c)) if order == 2 else m
    blocks = triton.cdiv(n, constants["ROWS"]) * b * (chunks if order > 0 else 1)
    count, size = cut(n, blocks, _BLOCKS, _LEAST)
    wide = acc_dtype(m.dtype)
    sums = torch.empty((count, b, n) if order != 1 else (count, 0), dtype=wide, device=m.device)
    grads = torch.empty((count, b, chunks * dims, n) if order > 0 else (count, 0), dtype=wide, device=m.device)
    rows = _samples_innermost(m)
    _triton.start(
        _features,
        (blocks * count,),
        m.contiguous(),
        rows,
        cotangent.contiguous(),
        _samples_innermost(cotangent) if order == 2 else rows,
        grad_output.contiguous(),
        _samples_innermost(grad_output) if order > 0 else rows,
        sums,
        grads,
        n,
        b,
        chunks * dims,
        count,
        size,
        int(include_self),
        device=m.device,
        A=_triton.types(m.dtype)["A"],
        **constants,
        **_OPTIONS,
    )
    found = [total(parts).movedim(-1, 0) for parts in (sums, grads)]
    return [found[0], found[1][..., :c]]


def features(m: Tensor, include_self: bool) -> Tensor:
    output = torch.empty(m.shape[:2], dtype=m.dtype, device=m.device)
    return output.copy_(_run(0, m, m, m, include_self)[0]) if output.numel() else output


def features_backward(grad_output: Tensor, m: Tensor) -> Tensor:
    grad_m = torch.empty(m.shape, dtype=m.dtype, device=m.device)
    return grad_m.copy_(_run(1, m, grad_output, m)[1]) if m.numel() else grad_m


def features_double_backward(cotangent: Tensor, grad_output: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    grad_grad_output, grad_m = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (grad_output, m))
    if grad_output.numel():
        sums, grads = _run(2, m, grad_output, cotangent)
        grad_grad_output.copy_(sums), grad_m.copy_(grads)
    return grad_grad_output, grad_m
