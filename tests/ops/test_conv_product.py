"""bfloat16 convolutions as matrix products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gankern
from gankern.ops.conv_act import product, reference
from gankern.ops.conv_act.reference import ConvOptions

# Narrow channels and pixels, wide channels, kernel, stride, padding, output padding.
CASES = [
    (96, (4, 4), 64, (4, 4), (2, 2), (1, 1), (0, 0)),
    (64, (3, 5), 80, (3, 2), (2, 1), (1, 0), (1, 0)),
    (70, (2, 2), 64, (5, 3), (3, 2), (0, 1), (1, 1)),
    (64, (1, 1), 65, (4, 4), (1, 1), (0, 0), (0, 0)),
]


def given(case: tuple, transposed: bool) -> tuple[Tensor, Tensor, Tensor, ConvOptions]:
    channels, size, wide, kernel, stride, padding, output_padding = case
    options = ConvOptions(stride, padding, (1, 1), transposed, output_padding if transposed else (0, 0), 1)
    weight = torch.randn(channels, wide, *kernel)
    up = options._replace(transposed=True, output_padding=output_padding)
    shape = (3, channels, *size) if transposed else reference.conv_shape((3, channels, *size), weight.shape, up)
    return torch.randn(shape), weight / wide**0.5, torch.randn(wide if transposed else channels), options


@pytest.mark.parametrize("large", [0, 1 << 30], ids=["product", "stock forward"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_accurate_as_stock(case: tuple, transposed: bool, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_LARGE_WEIGHT", large)
    *tensors, options = given(case, transposed)
    tensors = [t.bfloat16() for t in tensors]
    results = []
    for function, dtype in (
        (product.Product.apply, torch.bfloat16),
        (reference.conv, torch.bfloat16),
        (reference.conv, torch.float64),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        output = function(*leaves, options)
        if not results:
            grad = torch.randn_like(output)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))])
    for got, stock, exact in zip(*results, strict=True):
        assert got.dtype == torch.bfloat16
        assert got.shape == exact.shape
        bar = 2 * (stock.double() - exact).norm() + 2**-8 * exact.norm()
        assert (got.double() - exact).norm() <= bar


@pytest.mark.parametrize("transposed", [False, True])
def test_second_derivatives(transposed: bool) -> None:
    x, weight, _, options = given(CASES[1], transposed)

    def second(function) -> Tensor:
        leaves = [t.bfloat16().requires_grad_() for t in (x, weight)]
        output = function(*leaves, None, options)
        grads = torch.autograd.grad(output.float().square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in grads), leaves)[0]

    got, want = second(product.Product.apply), second(reference.conv)
    assert (got - want).norm() <= 0.02 * want.norm()


def test_which_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_has_matrix_units", lambda: True)
    x, weight, _, options = given(CASES[0], True)
    x, weight = x.bfloat16(), weight.bfloat16()
    assert product.applies(x, weight, options)
    assert not product.applies(x.float(), weight.float(), options)
    assert not product.applies(x[:0], weight, options)
    assert not product.applies(x.expand(3, -1, -1, -1).repeat(400, 1, 1, 1), weight, options), "many pixels"
    assert not product.applies(x, weight[:, :32], options), "few channels"
    assert not product.applies(x, weight, options._replace(dilation=(2, 2)))
    with gankern.backend("reference"):
        assert not product.applies(x, weight, options)
    with torch.autocast("cpu", torch.bfloat16):
        assert product.applies(x.float(), weight.float(), options)
        assert not product.applies(x.double(), weight.double(), options)
    monkeypatch.setattr(product, "_has_matrix_units", lambda: False)
    assert not product.applies(x, weight, options)


def test_blocks_under_autocast_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_has_matrix_units", lambda: True)
    block = gankern.fuse(nn.Sequential(nn.ConvTranspose2d(96, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()))
    x = torch.randn(8, 96, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = block(x)
    names, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(type(node).__name__)
            nodes += [following for following, _ in node.next_functions]
    assert "ProductBackward" in names
    output.float().sum().backward()
    assert block[0].weight.grad.dtype == torch.float32
