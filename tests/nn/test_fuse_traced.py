from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gans
import pytest
import torch
from torch import Tensor, nn

import gankern

f64 = torch.float64
Calls = Callable[[nn.Module], Any]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=f64)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "attributes": (gans.AttributeGenerator, lambda: ((noise(3, 5),), {})),
    "discriminator": (gans.AttributeDiscriminator, lambda: ((noise(3, 3, 8, 8), True), {})),
    "lists": (gans.ListGenerator, lambda: ((noise(3, 5, 2, 2),), {})),
    "sngan": (gans.ResGenerator, lambda: ((noise(3, 5),), {})),
    "resnet": (lambda: nn.Sequential(gans.BasicBlock(4), gans.BasicBlock(4)), lambda: ((noise(3, 4, 5, 5),), {})),
    "pix2pix": (gans.pix2pix, lambda: ((noise(2, 3, 8, 8),), {})),
    "unet": (gans.SkipUnet, lambda: ((noise(2, 3, 8, 8),), {})),
    "conditional": (
        gans.ConditionalGenerator,
        lambda: ((noise(3, 4),), {"labels": torch.tensor([0, 2, 1]), "scale": 0.7}),
    ),
    "progressive": (gans.ProgressiveGenerator, lambda: ((noise(3, 5),), {})),
    "rows": (gans.Discriminator, lambda: ((noise(3, 3, 8, 8), noise(2, 3, 8, 8)), {})),
}


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    return [value] if isinstance(value, Tensor) else [t for v in value for t in tensors(v)]


def assert_step(
    stock: nn.Module, ours: nn.Module, args: tuple[Any, ...], kwargs: Any, *, backward: bool = True
) -> None:
    """The same outputs, in type and layout as well, gradients and buffers."""
    want, got = stock(*args, **kwargs), ours(*args, **kwargs)
    assert type(want) is type(got)
    torch.testing.assert_close(got, want)
    for a, b in zip(tensors(want), tensors(got), strict=True):
        assert a.stride() == b.stride()
    if backward:
        for model, output in ((stock, want), (ours, got)):
            model.zero_grad()
            sum(t.square().sum() for t in tensors(output)).backward()
        for (name, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=name)
    for (name, a), b in zip(stock.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    stock = model.double()
    return stock, gankern.fuse(copy.deepcopy(stock))


def ran(call: Callable[[], Any]) -> set[str]:
    """The ops of gankern that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {e.key for e in profile.key_averages() if e.key.startswith("gankern::")}


def reasons(model: nn.Module) -> dict[tuple[str, tuple[str, ...]], str | None]:
    return {(run.module, run.names): run.reason for run in gankern.fusion_report(model)}


@pytest.mark.parametrize("name", MODELS)
def test_trains_and_evaluates_as_stock(name: str) -> None:
    make, inputs = MODELS[name]
    stock, ours = pair(make())
    assert list(stock.state_dict()) == list(ours.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (stock, ours)]
    for _ in range(3):
        assert_step(stock, ours, *inputs())
        for optimizer in optimizers:
            optimizer.step()
    stock.eval(), ours.eval()
    assert_step(stock, ours, *inputs())
    with torch.no_grad():
        assert_step(stock, ours, *inputs(), backward=False)
    stock.train(), ours.train()
    assert_step(stock, ours, *inputs())
    args, kwargs = inputs()
    assert ran(lambda: ours(*args, **kwargs))
