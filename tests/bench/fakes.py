"""A clock that moves only when work is done, and cases made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from gankern.bench.cases import Case, Run, Sides
from gankern.bench.check import Results
from gankern.bench.measure import run_case
from gankern.bench.results import OURS, STOCK, Measured, Report, Sweep, TrainingResult
from gankern.bench.timing import Spread


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

    return Case(name, "a fake", partial(setup), {"batch": 2}, {"batch": 1}, sizes={"batch": (1, 4)})


def report() -> Report:
    """A report with something in every part of it."""
    clock = Clock()
    right = replace(run_case(case(clock, "fake.forward"), clock=clock), flops=10**10, moved_bytes=10**9)
    slow = run_case(case(clock, "fake.slow", eager=clock.work("eager", 0.5)), clock=clock)
    sides = {"eager": Measured(Spread(0.3, 0.2, 0.4), 3 << 20), "gankern": Measured(Spread(0.1, 0.1, 0.2), 1 << 20)}
    points = [replace(right, size={"batch": n}, sides=_scaled(sides, n), best="eager") for n in (1, 4, 16)]
    training = TrainingResult(
        "dcgan",
        "ok",
        images=64,
        iterations=3,
        loss_error=1e-6,
        parameter_error=1e-3,
        sides={STOCK: Measured(Spread(2.0, 1.0, 3.0), 2**20), OURS: Measured(Spread(1.0, 1.0, 1.0), None)},
        ratio=Spread(2.0, 1.5, 2.5),
        losses={STOCK: [1.0], OURS: [1.0]},
    )
    return Report(
        "gankern bench fake --main",
        {
            "cpu": {"model": "Abacus 9", "cores": 2},
            "threads": 1,
            "ceilings": {"copy_bytes": 1e10, "cached_copy_bytes": 1e11, "float32_flops": 1e11},
        },
        [right, slow, run_case(case(clock, "fake.wrong", ours=9.0), clock=clock)],
        [training],
        [Sweep("fake.forward", "batch", points)],
        notes={"gradient_penalty": ["critic, by gankern's layers: conv2d 3"]},
    )


def _scaled(sides: dict[str, Measured], factor: int) -> dict[str, Measured]:
    return {
        name: Measured(
            Spread(*(factor * v for v in (side.seconds.median, side.seconds.p20, side.seconds.p80))),
            factor * (side.peak_bytes or 0),
        )
        for name, side in sides.items()
    }
