from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

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


def improved_gan(f: Tensor, theta: Tensor, log_weight_scale: Tensor, b: Tensor) -> Tensor:
    """The maths of openai/improved-gan's MinibatchLayer, sample by sample."""
    w = theta * (torch.exp(log_weight_scale) / torch.sqrt(theta.square().sum(0)))
    m = torch.einsum("na,abc->nbc", f, w)
    rows = []
    for i in range(len(f)):
        row = b.clone()
        for j in range(len(f)):
            masked = 1e6 if i == j else 0.0
            row = row + torch.exp(-((m[i] - m[j]).abs().sum(1) + masked))
        rows.append(row)
    return torch.cat([f, torch.stack(rows)], 1)


def test_matches_the_authors_code() -> None:
    layer = MinibatchDiscrimination(6, 5, 3, bias=True, weight_norm=True, dtype=torch.float64)
    assert layer.bias is not None
    assert layer.log_weight_scale is not None
    assert torch.equal(layer.bias, torch.full((5,), -1.0, dtype=torch.float64))
    with torch.no_grad():
        layer.log_weight_scale.normal_()
        layer.bias.normal_()
    f = torch.randn(7, 6, dtype=torch.float64)
    parameters = [layer.T, layer.log_weight_scale, layer.bias]
    assert [p.shape for p in parameters] == [(6, 5, 3), (5, 3), (5,)]
    got, want = layer(f), improved_gan(f, *parameters)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, parameters, cotangent), torch.autograd.grad(want, parameters, cotangent)
    )


def test_gradients_with_all_options() -> None:
    layer = MinibatchDiscrimination(3, 2, 2, bias=True, weight_norm=True, include_self=True, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    assert sorted(names) == ["T", "bias", "log_weight_scale"]

    def run(f: Tensor, *values: Tensor) -> Any:
        return functional_call(layer, dict(zip(names, values, strict=True)), (f, 2))

    inputs = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True), *layer.parameters()]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_weight_norm_starts_as_without() -> None:
    layer = MinibatchDiscrimination(64, 20, 4, weight_norm=True)
    near = layer(torch.randn(64, 64))[:, 64:] / 63
    assert 0.2 < near.mean() < 0.6


def test_include_self() -> None:
    layer = MinibatchDiscrimination(4, 3, 2, include_self=True)
    assert torch.equal(layer(torch.ones(1, 4)), torch.ones(1, 7))


@pytest.mark.parametrize("options", [{}, {"bias": True, "weight_norm": True, "include_self": True}], ids=str)
@pytest.mark.parametrize(("samples", "groups"), [(6, 1), (6, 2), (6, 3), (6, 6), (0, 2), (40, 2)])
def test_groups_are_calls_of_their_own(options: dict[str, bool], samples: int, groups: int) -> None:
    layer = MinibatchDiscrimination(4, 3, 2, dtype=torch.float64, **options)
    f = torch.randn(samples, 4, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(samples, 7, dtype=torch.float64)
    got, want = layer(f, groups=groups), torch.cat([layer(part) for part in f.chunk(groups)])
    torch.testing.assert_close(got, want)
    inputs = [f, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, cotangent), torch.autograd.grad(want, inputs, cotangent)
    )


def test_world_without_distributed_is_this_process() -> None:
    layer = MinibatchDiscrimination(4, 3, 2)
    alone = MinibatchDiscrimination(4, 3, 2, process_group="world")
    alone.load_state_dict(layer.state_dict())
    f = torch.randn(6, 4)
    assert torch.equal(alone(f, groups=2), layer(f, groups=2))


def test_empty_and_lone_batches() -> None:
    layer = MinibatchDiscrimination(4, 3, 2)
    assert layer(torch.zeros(0, 4)).shape == (0, 7)
    assert torch.equal(layer(torch.ones(1, 4)), torch.tensor([[1.0, 1, 1, 1, 0, 0, 0]]))


def test_state_and_repr() -> None:
    layer = MinibatchDiscrimination(4, 3, 2)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {"T": (4, 3, 2)}
    assert repr(layer) == "MinibatchDiscrimination(in_features=4, out_features=3, kernel_dims=2)"
    full = MinibatchDiscrimination(4, 3, 2, bias=True, weight_norm=True, include_self=True, process_group="world")
    assert repr(full) == (
        "MinibatchDiscrimination(in_features=4, out_features=3, kernel_dims=2, bias=True, weight_norm=True, "
        "include_self=True, process_group='world')"
    )
    before = layer.T.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.T)


@pytest.mark.parametrize(("options", "groups"), [({}, 1), ({"bias": True, "weight_norm": True}, 2)], ids=str)
def test_compile(options: dict[str, bool], groups: int) -> None:
    layer = MinibatchDiscrimination(4, 3, 2, **options)
    f = torch.randn(6, 4)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(f, groups), layer(f, groups))


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


@pytest.mark.parametrize("argument", ["bias", "weight_norm", "include_self"])
def test_bad_switches(argument: str) -> None:
    with pytest.raises(TypeError, match=f"{argument} must be a bool; got 1"):
        MinibatchDiscrimination(4, 3, 2, **{argument: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [True, "all", 0])
def test_bad_process_group(value: Any) -> None:
    with pytest.raises(TypeError, match='process_group must be None, "world" or a ProcessGroup of this rank; got'):
        MinibatchDiscrimination(4, 3, 2, process_group=value)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (0, ValueError, "groups must be at least 1; got 0"),
        (2.0, TypeError, "groups must be an int; got 2.0"),
        (4, ValueError, "input must have a multiple of groups=4 samples; got 6"),
    ],
)
def test_bad_groups(groups: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MinibatchDiscrimination(4, 3, 2)(torch.zeros(6, 4), groups)
