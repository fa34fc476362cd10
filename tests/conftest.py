from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gankern import workspace
from gankern.nn import stretch
from gankern.ops.gradient_penalty import autograd, small


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        return tensor

    return poisoned


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an op allocates holds NaN, so that an element it never writes shows."""
    if {"ops", "nn", "optim"} & set(request.path.parts):
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
        monkeypatch.setattr(workspace, "_empty", _poisoned(workspace._empty))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def any_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are small: kernels run in them all the same, but where the choice by size is tested."""
    if request.node.get_closest_marker("by_size") is None:
        monkeypatch.setattr(small, "is_small", lambda *args: False)
        monkeypatch.setattr(autograd, "_FEW_VALUES", 0)
        monkeypatch.setattr(stretch, "_FEW_PRODUCTS", 0)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
