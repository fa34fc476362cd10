from __future__ import annotations

from typing import Any

import pytest
import torch

from gankern.nn import MinibatchDiscrimination
from gankern.ops.minibatch_discrimination import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_appends_the_papers_features(dtype: torch.dtype) -> None:
    layer = MinibatchDiscrimination(6, 5, 3, dtype=dtype)
    f = torch.randn(7, 6, dtype=dtype)
    got = layer(f)
    assert got.shape == (7, 11)
    assert got.dtype == dtype
    assert torch.equal(got[:, :6], f)
    want = reference.minibatch_discrimination(torch.einsum("na,abc->nbc", f.double(), layer.T.double()))
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got[:, 6:].double(), want, rtol=tolerance, atol=tolerance)


def test_gradients() -> None:
    layer = MinibatchDiscrimination(4, 3, 2, dtype=torch.float64)
    f = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, f)
    assert torch.autograd.gradgradcheck(layer, f)
    layer(f).sum().backward()
    assert layer.T.grad is not None
    assert layer.T.grad.abs().min() > 0


@pytest.mark.parametrize(("in_features", "kernel_dims"), [(16, 4), (1024, 16)])
def test_features_start_between_zero_and_one(in_features: int, kernel_dims: int) -> None:
    layer = MinibatchDiscrimination(in_features, 20, kernel_dims)
    near = layer(torch.randn(64, in_features))[:, in_features:] / 63
    assert 0.2 < near.mean() < 0.6


def test_empty_and_lone_batches() -> None:
    layer = MinibatchDiscrimination(4, 3, 2)
    assert layer(torch.zeros(0, 4)).shape == (0, 7)
    assert torch.equal(layer(torch.ones(1, 4)), torch.tensor([[1.0, 1, 1, 1, 0, 0, 0]]))


def test_state_and_repr() -> None:
    layer = MinibatchDiscrimination(4, 3, 2)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {"T": (4, 3, 2)}
    assert repr(layer) == "MinibatchDiscrimination(in_features=4, out_features=3, kernel_dims=2)"
    before = layer.T.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.T)


def test_compile() -> None:
    layer = MinibatchDiscrimination(4, 3, 2)
    f = torch.randn(5, 4)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(f), layer(f))


@pytest.mark.parametrize("argument", ["in_features", "out_features", "kernel_dims"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_sizes(argument: str, value: Any, error: type[Exception]) -> None:
    sizes: dict[str, Any] = {"in_features": 4, "out_features": 3, "kernel_dims": 2, argument: value}
    with pytest.raises(error, match=f"{argument} must be"):
        MinibatchDiscrimination(**sizes)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0], TypeError, "input must be a Tensor; got list"),
        (torch.zeros(2, 4, dtype=torch.int32), TypeError, "input must have a floating-point dtype"),
        (torch.zeros(2, 5), ValueError, r"input must have shape \(N, 4\); got \(2, 5\)"),
        (torch.zeros(2, 4, 1), ValueError, r"input must have shape \(N, 4\); got \(2, 4, 1\)"),
    ],
)
def test_bad_input(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MinibatchDiscrimination(4, 3, 2)(value)
