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
from gankern.bench.check import Results
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
        left_out = {"cdist": "torch.cdist has no second derivative (torch 2.13)", "compile": DOUBLE_BACKWARD}
    # By cdist where it can be: the broadcast in float64 would not fit in memory at the sizes of a sweep.
    reference = side(broadcast if order == 2 else cdist, m.detach().double().requires_grad_(order > 0))
    ours = side(getattr(gankern().ops, op))
    if _by_rows(size, op, order):
        rows = torch.linspace(0, n - 1, _ROWS, dtype=torch.int64, device=device)
        reference = partial(_of_rows, m.detach(), grad_output, rows)
        variants = {name: partial(_rows_of, run, rows) for name, run in variants.items()}
        ours = partial(_rows_of, ours, rows)
    return Sides(
        reference=reference,
        stock=variants,
        ours={OURS: ours},
        work=n * n * b,
        unit="elements",
        tolerance=TOLERANCE[dtype],
        left_out=left_out,
        flops=_FLOPS[order] * b * c * n * (n - 1) // 2,
        moved_bytes=(1 + (order > 0)) * (m.nbytes + grad_output.nbytes) + m.nbytes * (order > 0),
    )


# Beyond so many samples some rows of the results are compared: float64's distances of all would not fit in memory.
_MOST_SAMPLES, _ROWS = 1024, 16


def _by_rows(size: Size, op: str, order: int) -> bool:
    return size["batch"] > _MOST_SAMPLES and op == "minibatch_discrimination" and order == 1


def _rows_of(run: Run, rows: Tensor) -> Results:
    return {name: [None if t is None else t[rows] for t in tensors] for name, tensors in run().items()}


def _of_rows(m: Tensor, grad_output: Tensor, rows: Tensor) -> Results:
    """Some samples' features, and the gradient of m there, by their formulas in float64."""
    wide, grad = m.double(), grad_output.double()
    outputs, grads = [], []
    for i in rows.tolist():
        differences = wide[i] - wide
        similarity = torch.exp(-differences.abs().sum(2))
        similarity[i] = 0
        outputs.append(similarity.sum(0))
        grads.append(-(((grad[i] + grad) * similarity).unsqueeze(2) * differences.sign()).sum(0))
    return {"output": [torch.stack(outputs)], "state": [], "gradient of m": [torch.stack(grads)]}


# A pair of samples and one number of theirs: difference, absolute value, sum; then for each order the sign's product
# with a weight, added to one sample and subtracted from the other.
_FLOPS = (3, 6, 9)


def _needs(size: Size, dtype: torch.dtype, *, op: str, order: int) -> dict[str, int]:
    """Differences, absolute values and signs of the broadcast; distances, exponentials and their gradients of cdist."""
    pairs = size["batch"] ** 2 * size["kernels"]
    broadcast, distances = 3 * pairs * size["dims"], 5 * pairs
    return {
        "eager": broadcast * (1 + (order == 2)) * dtype.itemsize,
        "cdist": distances * dtype.itemsize,
        "reference": 0 if _by_rows(size, op, order) else 8 * (2 * broadcast if order == 2 else distances),
    }


_PAIRS: dict[str, Any] = {
    "size": {"batch": 128, "kernels": 100, "dims": 8},
    "tiny": {"batch": 5, "kernels": 3, "dims": 2},
    "sizes": {"batch": (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096), "dims": (4, 8, 16, 32)},
}


def _pairs(op: str, order: int) -> dict[str, Any]:
    return {"setup": partial(_pairs_case, op=op, order=order), "needs": partial(_needs, op=op, order=order), **_PAIRS}


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
