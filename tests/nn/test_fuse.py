from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gankern
from gankern.nn import ConvBnAct2d, ConvTransposeBnAct2d
from gankern.nn.fuse import Fused, Run


def generator() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(5, 8, 4, 1, 0, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(True),
        nn.Sequential(nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.BatchNorm2d(6, momentum=None), nn.LeakyReLU(0.3)),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.BatchNorm2d(4, affine=False),
        nn.Tanh(),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Conv2d(4, 1, 1),
    )


def pair() -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    stock = generator().double()
    return stock, gankern.fuse(copy.deepcopy(stock)), torch.randn(3, 5, 1, 1, dtype=torch.float64)


def assert_same(stock: nn.Module, ours: nn.Module, z: Tensor) -> None:
    want, got = stock(z), ours(z)
    torch.testing.assert_close(got, want)
    stock.zero_grad(), ours.zero_grad()
    want.square().sum().backward(), got.square().sum().backward()
    for (name, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=name)
    for (name, b), c in zip(stock.named_buffers(), ours.named_buffers(), strict=True):
        torch.testing.assert_close(c[1], b, msg=name)


def test_fused_model_is_the_same_model() -> None:
    stock, ours, z = pair()
    assert list(stock.state_dict()) == list(ours.state_dict())
    for _ in range(3):
        assert_same(stock, ours, z)
    stock.eval(), ours.eval()
    assert_same(stock, ours, z)
    with torch.no_grad():
        torch.testing.assert_close(ours(z), stock(z))


def test_fuse_keeps_every_object() -> None:
    model = generator()
    before = dict(model.named_modules()), dict(model.named_parameters())
    assert gankern.fuse(model) is model
    assert all(dict(model.named_modules())[n] is m for n, m in before[0].items())
    assert all(dict(model.named_parameters())[n] is p for n, p in before[1].items())
    assert type(gankern.unfuse(model)) is nn.Sequential
    assert not any(isinstance(m, Fused) for m in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_stay_fused(copied: Any) -> None:
    stock, ours, z = pair()
    again = copied(ours)
    assert isinstance(again, Fused)
    assert_same(stock, again, z)


def test_hooks_keep_their_meaning() -> None:
    stock, ours, z = pair()
    seen: list[list[Tensor]] = [[], []]
    for model, outputs in zip((stock, ours), seen, strict=True):
        model[1].register_forward_hook(lambda m, i, o, outputs=outputs: outputs.append(o.detach()))
    assert_same(stock, ours, z)
    torch.testing.assert_close(seen[1], seen[0])


def test_fusion_report() -> None:
    model = generator()
    leaves = ("0", "1", "3.0", "3.1", "4", "5", "7", "8")
    assert {r.reason for r in gankern.fusion_report(model)} == {"not fused: call gankern.fuse"}
    assert gankern.fusion_report(gankern.fuse(model)) == [Run("", leaves, None)]
    model[1].register_forward_hook(lambda m, i, o: None)
    model(torch.randn(3, 5, 1, 1))
    own, inner = gankern.fusion_report(model)
    assert (own.module, own.names, inner.module, inner.names) == ("", ("0", "1", "4", "5", "7", "8"), "3", ("0", "1"))
    assert own.reason is not None


def test_compiles_into_one_graph() -> None:
    stock, ours, z = pair()
    assert_same(stock[:3], torch.compile(ours[:3], fullgraph=True), z)


@pytest.mark.parametrize(
    ("module", "stock"),
    [
        (
            lambda: ConvTransposeBnAct2d(3, 4, (3, 2), 2, 1, 1, bias=True, activation="leaky_relu", negative_slope=0.1),
            nn.LeakyReLU(0.1),
        ),
        (lambda: ConvBnAct2d(3, 4, 3, padding=1, activation="tanh", momentum=0.3), nn.Tanh()),
        (lambda: ConvBnAct2d(3, 4, 3, stride=2, activation="none", track_running_stats=False), nn.Identity()),
    ],
)
def test_modules_match_their_parts(module: Any, stock: nn.Module) -> None:
    block = module().double()
    parts = nn.Sequential(copy.deepcopy(block.conv), copy.deepcopy(block.bn), stock)
    x = torch.randn(4, 3, 6, 5, dtype=torch.float64)
    assert_same(parts, block, x)
    block.eval(), parts.eval()
    assert_same(parts, block, x)
    assert "activation=" in repr(block)


@pytest.mark.parametrize("function", [gankern.fuse, gankern.unfuse, gankern.fusion_report])
def test_bad_input(function: Any) -> None:
    with pytest.raises(TypeError, match="module"):
        function(torch.ones(3))


@pytest.mark.parametrize("kind", [ConvBnAct2d, ConvTransposeBnAct2d])
def test_bad_module_arguments(kind: Any) -> None:
    with pytest.raises(ValueError, match="activation"):
        kind(3, 4, 3, activation="selu")
    with pytest.raises(TypeError, match="negative_slope"):
        kind(3, 4, 3, negative_slope="steep")
    with pytest.raises(ValueError, match="groups"):
        kind(3, 4, 3, groups=2)
    with pytest.raises(ValueError, match="input"):
        kind(3, 4, 3)(torch.ones(2, 5, 6, 6))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_inference_sees_every_change(transposed: bool, dtype: torch.dtype) -> None:
    """Also those that bump no version counter: EMA code writes to ``.data``."""
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(32, 16, 4, 2, 1)
    stock = nn.Sequential(conv, nn.BatchNorm2d(16), nn.LeakyReLU(0.2)).to(dtype).eval()
    ours = gankern.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 32, 6, 6, dtype=dtype)
    bar = 3e-2 if dtype == torch.bfloat16 else 1e-4
    with torch.no_grad():
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            for model in (stock, ours):
                tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
                tensor.data.mul_(1.5).add_(0.1)
            torch.testing.assert_close(ours(x), stock(x), rtol=bar, atol=bar)


@pytest.mark.by_size
def test_small_ones_run_stock() -> None:
    ours, z = gankern.fuse(nn.Sequential(nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 1))), torch.randn(2, 5, 1, 1)
    for _ in range(4):
        ours(z)
    assert {run.reason for run in gankern.fusion_report(ours)} == {"stock is as fast"}


class ToChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


class Seen(nn.Module):
    """Somebody's module, with the strides of what it was given."""

    strides: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.strides = x.stride()
        return x


@pytest.mark.parametrize("first", [nn.Identity, ToChannelsLast])
@pytest.mark.parametrize("layers", [[nn.BatchNorm2d(8), nn.ReLU()], [nn.Conv2d(8, 8, 3), nn.ReLU()], []])
def test_modules_in_between_are_given_the_layout_that_stock_gives(first: type[nn.Module], layers: Any) -> None:
    stock = nn.Sequential(first(), nn.Conv2d(3, 8, 3), *layers, Seen(), nn.Conv2d(8, 4, 3))
    fused = gankern.fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, 9, 9)
    want, got = stock(x), fused(x)
    assert fused[-2].strides == stock[-2].strides
    assert got.stride() == want.stride()
