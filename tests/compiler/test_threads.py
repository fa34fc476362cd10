"""Threads that run modules while another thread derives plans of them see what is there, and nothing else."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern.compiler.cache import known_plans

pytestmark = pytest.mark.filterwarnings("ignore:the critic has batch norm")


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum((0, 2, 3), keepdim=True)


class Critic(nn.Module):
    """Statistics, a count that the forward writes, a parametrization, and a Function that is given a parameter."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = (
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, padding=1)),
            nn.BatchNorm2d(8),
        )
        self.weight, self.last = nn.Parameter(torch.rand(8, 1, 1) + 0.5), nn.Conv2d(8, 1, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = F.leaky_relu_(self.norm(self.first(x)), 0.2)
        return self.last(Scale.apply(h, self.weight).tanh()).flatten()


@contextmanager
def beside(run: Callable[[], object]) -> Iterator[list[str]]:
    """Another thread runs something over and over inside; what it raised."""
    done, errors = threading.Event(), []

    def work() -> None:
        while not done.is_set():
            try:
                run()
            except BaseException as error:
                errors.append(repr(error))
                return

    thread = threading.Thread(target=copy_context().run, args=(work,))
    thread.start()
    try:
        yield errors
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("fused", [False, True], ids=["penalty", "fused"])
def test_a_module_is_stocks_own_while_plans_of_it_are_derived(fused: bool) -> None:
    critic = Critic().double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    tensors = {id(t) for t in (*critic.parameters(), *critic.buffers())}
    with torch.no_grad():
        want = copy.deepcopy(critic)(x)
    if fused:
        gankern.fuse(critic)
    seen: list[int] = []

    def run() -> None:
        with torch.no_grad():
            got = nn.Module.__call__(critic, x)
        assert type(got) is Tensor
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert {id(t) for t in (*critic.parameters(), *critic.buffers())} == tensors
        seen.append(1)

    with beside(run) as errors:
        for n in range(3, 6):
            images = torch.randn(n, 3, 8, 8, dtype=torch.float64)
            if fused:
                for _ in range(3):
                    critic(images.requires_grad_()).sum().backward()
            else:
                gankern.penalties.r1(critic, images).backward()
    assert not errors, errors
    assert len(seen) > 3


def test_a_plan_is_used_while_another_is_derived() -> None:
    """Guards look at classes, which have methods of a derivation's own meanwhile."""
    critic, other, x = Critic().double(), Critic().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gankern.penalties.r1(critic, x)
    calls: list[int] = []

    def run() -> None:
        gankern.penalties.r1(critic, x)
        calls.append(1)

    with beside(run) as errors:
        for n in range(3, 6):
            gankern.penalties.r1(other, torch.randn(n, 3, 8, 8, dtype=torch.float64))
    assert not errors, errors
    plans = known_plans(critic)
    assert plans is not None
    assert (plans.made, plans.hits) == (1, len(calls)), plans


def test_random_numbers_of_other_threads_stay_drawn() -> None:
    before = random.getstate()
    with beside(random.random) as errors:
        critic = Critic().double()
        gankern.penalties.r1(critic, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert not errors
    assert random.getstate() != before
    plans = known_plans(critic)
    assert plans is not None
    assert plans.made == 1


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x) + torch.from_numpy(np.random.randn(1))  # noqa: NPY002


def test_numbers_of_numpys_are_refused_beside_other_threads() -> None:
    critic = Draws().double()
    with beside(lambda: None):
        gankern.penalties.r1(critic, torch.randn(2, 4, dtype=torch.float64))
    plans = known_plans(critic)
    assert plans is not None
    assert "numpy" in str(plans)


class Puts(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.last(x - self.mean)


def test_a_buffer_that_a_forward_replaces_is_never_a_fake() -> None:
    critic, x = Puts().double(), torch.randn(2, 4, dtype=torch.float64)
    critic.mean = critic.mean.double()

    def run() -> None:
        assert type(critic.mean) is Tensor

    with beside(run) as errors:
        for _ in range(3):
            gankern.penalties.r1(critic, x)
    assert not errors, errors
    plans = known_plans(critic)
    assert plans is not None
    assert "in the place of a buffer" in str(plans)
