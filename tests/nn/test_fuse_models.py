"""Models as people write them, fused: the same outputs, gradients, buffers and objects, and copies of them."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gans
import pytest
import torch
from torch import Tensor, nn

import gankern
from gankern.compiler import planning
from gankern.nn.fuse import Fused

f64 = torch.float64


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
    "subclass": (lambda: gans.ConvBlock(3, 4), lambda: ((noise(2, 3, 6, 6),), {})),
}


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    return [value] if isinstance(value, Tensor) else [t for v in value for t in tensors(v)]


def assert_step(stock: nn.Module, ours: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
    """The same outputs, in type and layout as well, gradients and buffers."""
    want, got = stock(*args, **kwargs), ours(*args, **kwargs)
    assert type(want) is type(got)
    torch.testing.assert_close(got, want)
    for a, b in zip(tensors(want), tensors(got), strict=True):
        assert a.stride() == b.stride()
    if torch.is_grad_enabled():
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
        assert_step(stock, ours, *inputs())
    stock.train(), ours.train()
    assert_step(stock, ours, *inputs())
    # Each convolution and batch norm is in the report once.
    names = [f"{run.module}.{name}".strip(".") for run in gankern.fusion_report(ours) for name in run.names]
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)
    assert {n for n, m in ours.named_modules() if isinstance(m, kinds)} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", MODELS)
def test_copies_stay_fused(name: str) -> None:
    make, inputs = MODELS[name]
    stock, ours = pair(make())
    assert_step(stock, ours, *inputs())
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved):
        again: Any = copied(ours)
        assert [type(m) for m in again.modules()] == [type(m) for m in ours.modules()]
        # What one copy's plan shows is true of all: they hold the same.
        with planning(copied is copy.deepcopy):
            assert_step(copy.deepcopy(stock), again, *inputs())
        assert [type(m) for m in gankern.unfuse(again).modules()] == [type(m) for m in stock.modules()]
        assert [set(m.__dict__) for m in again.modules()] == [set(m.__dict__) for m in stock.modules()]
        assert not {id(p) for p in again.parameters()} & {id(p) for p in ours.parameters()}


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class OwnDeepcopy(gans.ConvBlock):
    def __deepcopy__(self, memo: Any) -> OwnDeepcopy:
        result = self.__class__.__new__(self.__class__)
        memo[id(self)] = result
        for name, value in self.__dict__.items():
            result.__dict__[name] = copy.deepcopy(value, memo)
        return result


def test_own_deepcopy() -> None:
    stock, ours = pair(OwnDeepcopy(3, 4))
    x = noise(2, 3, 6, 6)
    assert_step(stock, ours, (x,), {})
    again = copy.deepcopy(ours)
    with torch.no_grad():
        again[1].bias.add_(1), stock[1].bias.add_(1)
    assert_step(stock, again, (x,), {})


def generator() -> tuple[nn.Module, nn.Module, Tensor]:
    return *pair(gans.ConditionalGenerator()), noise(3, 4)


def same(stock: nn.Module, ours: nn.Module, z: Tensor) -> None:
    assert_step(stock, ours, (z,), {"labels": torch.tensor([0, 2, 1])})


def test_fuse_keeps_every_object() -> None:
    model = gans.ConditionalGenerator()
    kinds, text = [type(m) for m in model.modules()], repr(model)
    before = dict(model.named_modules()), dict(model.named_parameters())
    assert gankern.fuse(model) is model
    assert repr(model) == text
    assert any(isinstance(m, Fused) for m in model.modules())
    for module, kind in zip(model.modules(), kinds, strict=True):
        assert isinstance(module, kind)
        assert (type(module).__name__, type(module).__module__) == (kind.__name__, kind.__module__)
    assert all(dict(model.named_modules())[n] is m for n, m in before[0].items())
    assert all(dict(model.named_parameters())[n] is p for n, p in before[1].items())
    fused = [type(m) for m in model.modules()]
    assert [type(m) for m in gankern.fuse(model).modules()] == fused  # fusing twice changes nothing
    assert [type(m) for m in gankern.unfuse(model).modules()] == kinds


def test_weights_init_by_class_name() -> None:
    stock, fused = [[], []]
    gans.pix2pix().apply(lambda m: stock.append(m.__class__.__name__))
    gankern.fuse(gans.pix2pix()).apply(lambda m: fused.append(m.__class__.__name__))
    assert fused == stock


def test_state_before_and_after() -> None:
    stock, ours, z = generator()
    other = gans.ConditionalGenerator().double()
    for model in (stock, ours):
        model.load_state_dict(other.state_dict())
    same(stock, ours, z)
    ours.load_state_dict(stock.state_dict(), assign=True)
    stock = copy.deepcopy(stock)
    same(stock, ours, z)
    for model in (stock, ours):
        for p in model.parameters():
            p.data = p.data * 1.5
    same(stock, ours, z)
    for model in (stock, ours):
        model.first[0] = nn.ConvTranspose2d(8, 8, 4, bias=False).double()
        model.first[0].weight.data.fill_(0.1)
        model.first[1].momentum = 0.7
        model.first[2] = nn.LeakyReLU(0.3)
    same(stock, ours, z)


def test_to_dtype_after() -> None:
    stock, ours, z = generator()
    same(stock, ours, z)
    stock.float(), ours.float()
    labels = torch.tensor([0, 2, 1])
    torch.testing.assert_close(ours(z.float(), labels=labels), stock(z.float(), labels=labels), rtol=1e-4, atol=1e-4)
    for model in (stock, ours):  # images of another type are refused as in stock
        with pytest.raises(RuntimeError, match="type"):
            model.first(noise(3, 8, 1, 1))


def test_averaged_model() -> None:
    stock, ours, z = generator()
    same(stock, ours, z)
    averaged = [torch.optim.swa_utils.AveragedModel(m, use_buffers=True) for m in (stock, ours)]
    for _ in range(2):
        same(stock, ours, z)
        averaged[0].update_parameters(stock), averaged[1].update_parameters(ours)
    same(*averaged, z)
    assert isinstance(averaged[1].module.first, Fused)


def test_gradient_penalty() -> None:
    stock = gans.Discriminator().eval()
    ours = gankern.fuse(copy.deepcopy(stock))
    real, fake = torch.randn(2, 4, 3, 8, 8)
    alpha = torch.rand(4)
    for _ in range(2):
        grads = []
        for model in (stock, ours):
            model.zero_grad()
            gankern.gradient_penalty(
                lambda x, m=model: m(x)[0], real, fake, params=list(model.parameters()), alpha=alpha
            ).backward()
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)
        ours(real)


def test_first_use_by_two_threads() -> None:
    stock, ours, z = generator()
    stock.eval(), ours.eval()
    labels = torch.tensor([0, 2, 1])
    want = stock(z, labels=labels)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda m: m(z, labels=labels), [ours, stock] * 20):
            torch.testing.assert_close(got, want)


def test_a_forward_of_ones_own_is_planned() -> None:
    torch.manual_seed(0)
    stock = gans.AttributeGenerator().double()
    model = gankern.fuse(copy.deepcopy(stock))
    given = [torch.randn(3, 5, 1, 1, dtype=torch.float64) for _ in range(2)]
    given = given[: len(inspect.signature(stock.forward).parameters)]
    torch.testing.assert_close(model(*given), stock(*given), rtol=1e-9, atol=1e-11)
    (run,) = gankern.fusion_report(model)
    assert run.names[:3] == ("deconv1", "deconv1_bn", "deconv2")


def test_classes_that_cannot_be_extended() -> None:
    registry: list[str] = []

    class Watching(nn.Sequential):
        def __init_subclass__(cls) -> None:
            registry.append(cls.__name__)

    class Model(Watching):
        pass

    model = gankern.fuse(Model(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)))
    assert registry == ["Model"]
    assert type(model) is Model
    assert {run.reason for run in gankern.fusion_report(model)} == {"Watching watches its subclasses"}
