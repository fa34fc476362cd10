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
    from gankern.ops.minibatch_discrimination import reference

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
        reference=side(getattr(reference, op), m.detach().double().requires_grad_(order > 0)),
        stock=variants,
        ours={OURS: side(getattr(gankern().ops, op))},
        work=n * n * b,
        unit="elements",
        tolerance=TOLERANCE[dtype],
        left_out=left_out,
    )


_PAIRS: dict[str, Any] = {
    "size": {"batch": 128, "kernels": 100, "dims": 8},
    "tiny": {"batch": 5, "kernels": 3, "dims": 2},
}


_pairs = partial(partial, _pairs_case)

CASES = [
    Case(
        "l1_distance.training",
        "pairwise L1 distances, forward and backward",
        _pairs(op="l1_distance", order=1),
        **_PAIRS,
    ),
    Case(
        "minibatch_discrimination.forward",
        "minibatch features, forward",
        _pairs(op="minibatch_discrimination", order=0),
        **_PAIRS,
    ),
    Case(
        "minibatch_discrimination.training",
        "minibatch features, forward and backward",
        _pairs(op="minibatch_discrimination", order=1),
        **_PAIRS,
    ),
    Case(
        "minibatch_discrimination.double_backward",
        "minibatch features, forward, backward and double backward",
        _pairs(op="minibatch_discrimination", order=2),
        **_PAIRS,
    ),
]
