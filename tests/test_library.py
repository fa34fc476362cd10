"""Eager calls go past torch's dispatcher, but where somebody has to see the operator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gankern.ops.minibatch_discrimination import autograd

OP = torch.ops.gankern.l1_distance.default


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(func)
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        seen.append(func)
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


seen: list[Any] = []


@pytest.fixture(autouse=True)
def dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen.clear()
    (places,) = [c for c in (autograd._distance_op.__closure__ or ()) if c.cell_contents is OP]

    def op(*args: Any) -> Any:
        seen.append("dispatched")
        return OP(*args)

    monkeypatch.setattr(places, "cell_contents", op)


def test_a_plain_call_is_direct() -> None:
    m = torch.randn(3, 2, 4)
    found = autograd._distance_op(m)
    assert autograd._distance_op(torch.nn.Parameter(m, requires_grad=False)).equal(found)
    assert seen == []
    assert OP(m).equal(found)


@pytest.mark.parametrize(
    "watcher",
    [Functions, Operators, lambda: torch.autograd.profiler.profile(), FakeTensorMode],
    ids=["function-mode", "dispatch-mode", "profiler", "fake"],
)
def test_whoever_watches_sees_the_operator(watcher: Callable[[], AbstractContextManager[Any]]) -> None:
    with watcher() as profile:
        autograd._distance_op(torch.randn(3, 2, 4))
    assert "dispatched" in seen
    if watcher is Operators:
        assert OP in seen
    if not isinstance(profile, (Functions, Operators, FakeTensorMode)):
        assert "gankern::l1_distance" in {e.key for e in profile.key_averages()}


def test_tensors_of_other_peoples_types_are_dispatched() -> None:
    autograd._distance_op(torch.randn(3, 2, 4).as_subclass(Own))
    assert seen[:2] == ["dispatched", OP]


def test_a_trace_has_the_operator() -> None:
    traced = torch.jit.trace(lambda m: autograd._distance_op(m), torch.randn(3, 2, 4), check_trace=False)
    assert "gankern::l1_distance" in str(traced.graph)
