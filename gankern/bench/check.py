"""Whether two sides computed the same thing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

Results = Mapping[str, Sequence[torch.Tensor | None]]


class Wrong(Exception):
    """A side's result differs from the reference by more than the case allows."""


def relative_error(got: Sequence[torch.Tensor | None], want: Sequence[torch.Tensor | None]) -> float:
    """Return ||got - want|| / ||want|| over all tensors together, in float64.

    None is a zero tensor, as autograd means it. A shape that differs gives infinity, a NaN gives NaN.
    """
    if len(got) != len(want):
        return math.inf
    difference = norm = 0.0
    for mine, theirs in zip(got, want, strict=True):
        if mine is None and theirs is None:
            continue
        if mine is not None and theirs is not None and mine.shape != theirs.shape:
            return math.inf
        a = torch.zeros((), dtype=torch.float64) if mine is None else mine.detach().double().cpu()
        b = torch.zeros((), dtype=torch.float64) if theirs is None else theirs.detach().double().cpu()
        difference += (a - b).square().sum().item()
        norm += b.square().sum().item()
    return math.sqrt(difference) / max(math.sqrt(norm), 1e-30)


def compare(got: Results, want: Results, tolerance: float) -> float:
    """Return the largest relative error of any named result; raise `Wrong` where one is above `tolerance`."""
    if got.keys() != want.keys():
        raise Wrong(f"results {sorted(got)} instead of {sorted(want)}")
    worst = 0.0
    for name in want:
        if not all(t is None or t.isfinite().all() for t in want[name]):
            raise Wrong(f"{name}: not finite in the reference itself")
        error = relative_error(got[name], want[name])
        # Not `error > tolerance`: a NaN must not pass.
        if not error <= tolerance:
            raise Wrong(f"{name}: relative error {error:.1e} above {tolerance:.0e}")
        worst = max(worst, error)
    return worst
