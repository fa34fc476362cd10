"""Pairwise distances and minibatch discrimination."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gankern.bench import stock
from gankern.bench.cases.case import (
    DOUBLE_BACKWARD,
    TOLERANCE,
    Case,
    Run,
    Sides,
    Size,
    double_backward,
    forward,
    forward_backward,
    gankern,
    random_tensor,
)
from gankern.bench.results import OURS


def _pairs_case(size: Size, dtype: torch.dtype, device: str, *, op: str, order: int) -> Sides:
    """Sides of `l1_distance` or `minibatch_discrimination`, up to the derivative of the given order."""
    n, b, c = size["batch"], size["kernels"], size["dims"]
    # Distances near one: features neither vanish nor saturate.
    m = random_tensor(n, b, c, dtype=dtype, device=device, scale=0.5 / c**0.5).requires_grad_(order > 0)
    shape = (n, n, b) if op == "l1_distance" else (n, b)
    grad_output = random_tensor(*shape, dtype=dtype, device=device)

    def side(function: Callable[[Tensor], Tensor], m: Tensor = m) -> Run:
        if order == 2:
            return double_backward(function, m, grad_output.to(m.dtype))
        call = partial(function, m)
        return forward_backward(call, {"m": m}, grad_output.to(m.dtype)) if order else forward(call)

    broadcast, cdist = getattr(stock, op), getattr(stock, f"{op}_cdist")
    variants = {"eager": side(broadcast)}
    left_out = {}
    if order < 2:
        variants |= {"cdist": side(cdist), "compile": side(torch.compile(broadcast, dynamic=False))}
    else:
        left_out = {"cdist": "torch.cdist has no second derivative", "compile": DOUBLE_BACKWARD}
    return Sides(
        # By cdist where it can be: the broadcast in float64 would not fit in memory at the sizes of a sweep.
        reference=side(broadcast if order == 2 else cdist, m.detach().double().requires_grad_(order > 0)),
        stock=variants,
        ours={OURS: side(getattr(gankern().ops, op))},
        work=n * n * b,
        unit="elements",
        tolerance=TOLERANCE[dtype],
        left_out=left_out,
        flops=_FLOPS[order] * b * c * n * (n - 1) // 2,
        moved_bytes=(1 + (order > 0)) * (m.nbytes + grad_output.nbytes) + m.nbytes * (order > 0),
    )


# A pair of samples and one number of theirs: difference, absolute value, sum; then for each order the sign's product
# with a weight, added to one sample and subtracted from the other.
_FLOPS = (3, 6, 9)


def _needs(size: Size, dtype: torch.dtype, *, order: int) -> dict[str, int]:
    """Differences, absolute values and signs of the broadcast; distances, exponentials and their gradients of cdist."""
    pairs = size["batch"] ** 2 * size["kernels"]
    broadcast, distances = 3 * pairs * size["dims"], 5 * pairs
    return {
        "eager": broadcast * (1 + (order == 2)) * dtype.itemsize,
        "cdist": distances * dtype.itemsize,
        "reference": 8 * (2 * broadcast if order == 2 else distances),
    }


_PAIRS: dict[str, Any] = {
    "size": {"batch": 128, "kernels": 100, "dims": 8},
    "tiny": {"batch": 5, "kernels": 3, "dims": 2},
    "sizes": {"batch": (32, 64, 128, 256, 512, 1024), "dims": (4, 8, 16, 32)},
}


def _pairs(op: str, order: int) -> dict[str, Any]:
    return {"setup": partial(_pairs_case, op=op, order=order), "needs": partial(_needs, order=order), **_PAIRS}


CASES = [
    Case(
        "l1_distance.training",
        "pairwise L1 distances, forward and backward",
        **_pairs(op="l1_distance", order=1),
    ),
    Case(
        "minibatch_discrimination.forward",
        "minibatch features, forward",
        **_pairs(op="minibatch_discrimination", order=0),
    ),
    Case(
        "minibatch_discrimination.training",
        "minibatch features, forward and backward",
        **_pairs(op="minibatch_discrimination", order=1),
    ),
    Case(
        "minibatch_discrimination.double_backward",
        "minibatch features, forward, backward and double backward",
        **_pairs(op="minibatch_discrimination", order=2),
    ),
]
