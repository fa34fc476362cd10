"""A clock that moves only when work is done, and cases made of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from gankern.bench.cases import Case, Run, Sides
from gankern.bench.check import Results


class Clock:
    """Time in seconds, and who spent it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float, result: float = 1.0) -> Run:
        def run() -> Results:
            self.now += seconds
            self.order.append(name)
            return {"output": [torch.full((3,), result)]}

        return run


def case(clock: Clock, name: str = "fake.forward", ours: float = 1.0, **stock: Callable[[], Results]) -> Case:
    """A case whose gankern takes one second and gives `ours`; right is 1."""

    def setup(size: object, dtype: torch.dtype, device: str) -> Sides:
        return Sides(
            reference=clock.work("reference", 0.0),
            stock=stock or {"eager": clock.work("eager", 3.0), "compile": clock.work("compile", 2.0)},
            ours={"gankern": clock.work("gankern", 1.0, ours)},
            work=3,
            unit="elements",
            tolerance=1e-4,
            left_out={"cdist": "no second derivative"},
        )

    return Case(name, "a fake", partial(setup), {"batch": 2}, {"batch": 1})
