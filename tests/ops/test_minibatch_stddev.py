from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import layouts
from torch import Tensor

from gankern import ops
from gankern.nn import MinibatchStdDev


def loop(x: Tensor, group_size: int, num_channels: int, eps: float) -> Tensor:
    """The new channels, number by number."""
    n, c, h, w = x.shape
    group = min(group_size, n)
    added = torch.zeros(n, num_channels, h, w, dtype=torch.float64)
    per = c // num_channels
    for first in range(n // group):
        members = [i for i in range(n) if i % (n // group) == first]
        for part in range(num_channels):
            total = 0.0
            for channel in range(part * per, (part + 1) * per):
                for row in range(h):
                    for column in range(w):
                        values = [x[i, channel, row, column].item() for i in members]
                        mean = sum(values) / group
                        total += math.sqrt(sum((v - mean) ** 2 for v in values) / group + eps)
            for i in members:
                added[i, part] = total / (per * h * w)
    return added


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "group_size", "num_channels"),
    [
        ((8, 4, 2, 3), 4, 1),
        ((8, 4, 2, 3), 4, 2),
        ((6, 3, 2, 2), 3, 3),
        ((3, 2, 1, 2), 4, 1),
        ((4, 2, 2, 2), 1, 1),
        ((1, 2, 2, 2), 4, 1),
    ],
)
def test_is_the_loop(shape: tuple[int, ...], group_size: int, num_channels: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    got = ops.minibatch_stddev(x, group_size, num_channels, eps=1e-3)
    assert got.dtype == dtype
    assert torch.equal(got[:, : shape[1]], x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    want = loop(x.double(), group_size, num_channels, 1e-3)
    torch.testing.assert_close(got[:, shape[1] :].double(), want, rtol=tolerance, atol=0)


def test_groups_are_strided() -> None:
    x = torch.tensor([0.0, 1, 0, 3]).view(4, 1, 1, 1)
    assert ops.minibatch_stddev(x, 2)[:, 1].flatten().tolist() == pytest.approx([1e-4, 1, 1e-4, 1])


@pytest.mark.parametrize(("group_size", "num_channels"), [(2, 1), (4, 2)])
def test_derivatives(group_size: int, num_channels: int) -> None:
    x = torch.randn(4, 2, 2, 1, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return ops.minibatch_stddev(x, group_size, num_channels, eps=1e-2)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)
    (grad,) = torch.autograd.grad(run(x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), x, create_graph=True)
    assert torch.autograd.grad(second.pow(2).sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_equal_samples_have_finite_gradients(samples: int) -> None:
    x = torch.ones(samples, 2, 3, 3, requires_grad=True)
    output = ops.minibatch_stddev(x)
    torch.testing.assert_close(output[:, 2], torch.full((samples, 3, 3), 1e-4))
    (grad,) = torch.autograd.grad(output[:, 2].sum(), x, create_graph=True)
    assert torch.equal(grad, torch.zeros_like(x))
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.isfinite().all()


def test_layouts() -> None:
    x = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    for name, other in layouts(x).items():
        torch.testing.assert_close(ops.minibatch_stddev(other), ops.minibatch_stddev(other.contiguous()), msg=name)
    last = ops.minibatch_stddev(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, ops.minibatch_stddev(x))


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (4, 2, 0, 3)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    output = ops.minibatch_stddev(x, num_channels=2)
    assert output.shape == (shape[0], 4, *shape[2:])
    output.sum().backward()
    assert x.grad is not None


def test_module() -> None:
    x = torch.randn(6, 4, 2, 2)
    layer = MinibatchStdDev(3, 2, eps=1e-4)
    assert torch.equal(layer(x), ops.minibatch_stddev(x, 3, 2, 1e-4))
    assert repr(layer) == "MinibatchStdDev(group_size=3, num_channels=2, eps=0.0001)"
    assert not layer.state_dict()


def test_compile() -> None:
    x = torch.randn(6, 4, 2, 2, requires_grad=True)
    layer = MinibatchStdDev(3, 2, eps=1e-4)
    got, want = torch.compile(layer, fullgraph=True)(x), layer(x)
    torch.testing.assert_close(got, want)
    (got_grad,), (want_grad,) = (torch.autograd.grad(y.square().sum(), x) for y in (got, want))
    torch.testing.assert_close(got_grad, want_grad)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0], TypeError, "input must be a Tensor; got list"),
        (torch.zeros(4, 2, 1, 1, dtype=torch.int32), TypeError, "input must have a floating-point dtype"),
        (torch.zeros(4, 2, 1), ValueError, r"input must have shape \(N, C, H, W\); got \(4, 2, 1\)"),
        (torch.zeros(6, 2, 1, 1), ValueError, "input must have a multiple of group_size=4 samples; got 6"),
        (torch.zeros(4, 3, 1, 1), ValueError, "input must have a multiple of num_channels=2 channels; got 3"),
        (torch.zeros(4, 0, 1, 1), ValueError, "input must have a multiple of num_channels=2 channels; got 0"),
    ],
)
def test_bad_input(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.minibatch_stddev(value, num_channels=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group_size": 0}, ValueError, "group_size must be at least 1; got 0"),
        ({"group_size": 2.0}, TypeError, "group_size must be an int; got 2.0"),
        ({"num_channels": 0}, ValueError, "num_channels must be at least 1; got 0"),
        ({"eps": 0.0}, ValueError, "eps must be greater than 0; got 0.0"),
        ({"eps": "1"}, TypeError, "eps must be a number; got '1'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.minibatch_stddev(torch.zeros(4, 2, 1, 1), **options)
    with pytest.raises(error, match=message):
        MinibatchStdDev(**options)
