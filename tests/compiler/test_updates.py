"""An optimizer's step by one call leaves what its own leaves; where that is not sure, its own runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gankern.compiler.updates import _update, call_opaque

SHAPES = [(3, 5), (7,), (4, 3, 2, 2), (1,), ()]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(0)
    found = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    found[2] = found[2].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(t) for t in found]


def with_grads(*lists: list[nn.Parameter], call: int) -> None:
    for params in lists:
        generator = torch.Generator().manual_seed(call)
        for p in params:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        if call % 2:
            params[1].grad = None


def build(name: str, **options: Any) -> Callable[[list[nn.Parameter]], Any]:
    def make(params: list[nn.Parameter]) -> Any:
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 1e-3}]
        return getattr(torch.optim, name)(groups, lr=1e-2, **options)

    return make


ONE_CALL = [
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"betas": (0.0, 0.9), "maximize": True}),
    ("AdamW", {"amsgrad": True}),
    ("AdamW", {"weight_decay": 0.3, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    ("RMSprop", {"maximize": True, "alpha": 0.9}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("name", "options"), ONE_CALL)
def test_one_call(name: str, options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    a, b = build(name, **options)(ours), build(name, **options)(theirs)
    by_one_call = 0
    for call in range(6):
        with_grads(ours, theirs, call=call)
        before = [None if p.grad is None else p.grad.clone() for p in ours]
        done = _update(a)
        by_one_call += done
        if not done:
            a.step()
        b.step()
        for p, grad in zip(ours, before, strict=True):
            assert p.grad is grad if p.grad is None or grad is None else torch.equal(p.grad, grad)
    assert by_one_call >= 4
    for own, others in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, others, rtol=tolerance, atol=tolerance)
    assert [s.keys() for s in a.state_dict()["state"].values()] == [s.keys() for s in b.state_dict()["state"].values()]
    for own, others in zip(a.state_dict()["state"].values(), b.state_dict()["state"].values(), strict=True):
        for key in own:
            torch.testing.assert_close(own[key], others[key], rtol=tolerance, atol=tolerance)


def expanded_state(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].t().contiguous().t()


def turned_gradient(optimizer: Any, params: list[nn.Parameter]) -> None:
    assert params[0].grad is not None
    params[0].grad = params[0].grad.t().contiguous().t()


def tensor_lr(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)


def wide_step(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["step"] = optimizer.state[params[0]]["step"].double()


def fused(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[1]["fused"] = True


def no_state(optimizer: Any, params: list[nn.Parameter]) -> None:
    del optimizer.state[params[2]]


@pytest.mark.parametrize("change", [expanded_state, turned_gradient, tensor_lr, wide_step, fused, no_state])
def test_the_optimizers_own_step_runs(change: Callable[[Any, list[nn.Parameter]], None]) -> None:
    ours, theirs = parameters(), parameters()
    a, b = build("Adam")(ours), build("Adam")(theirs)
    with_grads(ours, theirs, call=0)
    a.step(), b.step()
    assert _update(a)
    b.step()
    change(a, ours)
    change(b, theirs)
    before = [p.detach().clone() for p in ours]
    assert not _update(a)
    assert all(map(torch.equal, before, ours))
    call_opaque(a, "step", (), {})
    b.step()
    for own, others in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, others, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), [("Adam", {}), ("RMSprop", {}), ("SGD", {"momentum": 0.9})])
def test_versions_and_schedulers_are_told(name: str, options: dict[str, Any]) -> None:
    params = parameters()
    optimizer = build(name, **options)(params)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    with_grads(params, call=0)
    optimizer.step()
    versions = [p._version for p in params]
    optimizer._opt_called = False
    assert _update(optimizer) and optimizer._opt_called
    assert all(p._version > v for p, v in zip(params, versions, strict=True))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
