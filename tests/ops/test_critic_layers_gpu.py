"""The critic layers by the kernels of the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from critics import layered
from oracle import assert_as_accurate, cuts
from torch import Tensor, nn

from gankern import backends
from gankern.ops.conv_act.reference import ConvOptions
from gankern.ops.critic_layers import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = ("output", "grad_input", "grad_weight", "grad_bias", "d2_grad_output", "d2_input", "d2_weight")


def adapter(*tensors: Tensor) -> Any:
    return backends.select("critic_layers", *tensors)


def norm_results(module: Any, x: Tensor, grad: Tensor, tangent: Tensor, affine: list[Any], groups: int) -> list[Tensor]:
    """Of layer norm where there are no groups."""
    name, options = ("group_norm", (groups,)) if groups else ("layer_norm", ())
    y, mean, rstd = getattr(module, f"{name}_forward")(x, *affine, *options, 1e-2)
    first = getattr(module, f"{name}_backward")(grad, x, affine[0], mean, rstd, True)
    second = getattr(module, f"{name}_double_backward")(tangent, grad, x, affine[0], mean, rstd, True)
    return [y, *first, *second]


def check_norm(given: tuple[Tensor, ...], affine: list[Any], groups: int, dtype: torch.dtype) -> None:
    def results(module: Any, kind: torch.dtype) -> list[Tensor]:
        params = [None if t is None else t.to(kind) for t in affine]
        return norm_results(module, *(t.to(kind) for t in given), params, groups)

    # The plain formulas in float32 stand for stock in half types, which has none of its own at this precision.
    wide = dtype if dtype == torch.float64 else torch.float32
    sides = results(adapter(given[0]), dtype), results(reference, wide), results(reference, torch.float64)
    for name, g, s, e in zip(NAMES, *sides, strict=True):
        # What cancels leaves rounding errors of the terms, not of the difference.
        floor = e.norm() * 2e-6 + 1e-5 * given[0][0].numel() ** 0.5
        if dtype != torch.float32 or (g.double() - e).norm() > floor:
            assert_as_accurate(g, s.to(dtype), e, f"{name} {dtype}")


# Around packs, a block's threads and the tiles; the largest are slow without a GPU.
ROWS = [*((shape, dtype) for shape in [(2, 37), (3, 16)] for dtype in DTYPES), ((1, 2), torch.float32)]
ROWS += [((2, 1100), torch.float64), ((1, 4300), torch.float32)]


@pytest.mark.parametrize(("shape", "dtype"), ROWS, ids=str)
def test_layer_norm_kernels(gpu: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, grad, tangent = torch.randn(3, *shape, device=gpu).to(dtype)
    for affine in ([None, None], list(torch.randn(2, shape[1], device=gpu).to(dtype))):
        check_norm((x + 3, grad, tangent), affine, 0, dtype)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        *(((2, 6, 37), g) for g in (1, 3, 6)),
        ((1, 70, 3), 35),
        ((1, 2, 1100), 2),
        ((2, 16, 1), 4),
        ((5, 8, 4), 8),
    ],
    ids=str,
)
def test_group_norm_kernels(gpu: torch.device, shape: tuple[int, int, int], groups: int, last: bool) -> None:
    dtypes = DTYPES if groups == 3 else (torch.float64,)
    for dtype in dtypes:
        given = (
            torch.randn(3, *shape, device=gpu)
            .to(dtype)
            .add(torch.tensor([3.0, 0, 0], device=gpu).view(3, 1, 1, 1).to(dtype))
            .unbind()
        )
        if last:
            given = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in given)
        for affine in ([None, None], list(torch.randn(2, shape[1], device=gpu).to(dtype))):
            check_norm(given, affine, groups, dtype)


def test_samples_are_parted_for_the_gradients_of_parameters(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several samples a part, the last part with fewer."""
    from gankern.ops.critic_layers import norms

    monkeypatch.setattr(norms, "_BLOCKS", 3)
    for shape, groups in (((10, 37), 0), ((7, 6, 5), 3), ((8, 2, 3), 1)):
        given = torch.randn(3, *shape, device=gpu, dtype=torch.float64).unbind()
        check_norm(given, list(torch.randn(2, shape[1], device=gpu, dtype=torch.float64)), groups, torch.float64)


@pytest.mark.parametrize("name", ["layer", "group"])
def test_norms_take_what_is_not_aligned(gpu: torch.device, name: str) -> None:
    """Arrays that start at no multiple of 16 bytes, gradients in another order, only weights."""
    shape = (3, 16) if name == "layer" else (3, 8, 8)
    size = 3 * 16 if name == "layer" else 3 * 64
    x = torch.randn(size + 1, device=gpu, dtype=torch.float64)[1:].view(shape)
    grad = torch.randn(1, *shape[1:], device=gpu, dtype=torch.float64).expand(shape)
    tangent = torch.randn(shape[::-1], device=gpu, dtype=torch.float64).permute(*range(len(shape) - 1, -1, -1))
    groups = 0 if name == "layer" else 2
    affine = [torch.randn(shape[1], device=gpu, dtype=torch.float64), None]
    for a, b in zip(
        norm_results(adapter(x), x, grad, tangent, affine, groups),
        norm_results(reference, x, grad, tangent, affine, groups),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_norms_far_from_zero_and_of_what_is_not_finite(gpu: torch.device) -> None:
    x = torch.randn(4, 40, device=gpu) + 1000
    x[2] = 7.0
    x[3, 5] = float("nan")
    ours, stock, exact = (
        m.layer_norm_forward(t, None, None, 1e-5)[0]
        for m, t in ((adapter(x), x), (reference, x), (reference, x.double()))
    )
    assert_as_accurate(ours[:2], stock[:2], exact[:2])
    assert ours[2].eq(0).all()
    assert ours[3].isnan().all()
    y = x[:, :, None].contiguous()
    grouped = adapter(y).group_norm_forward(y, None, None, 4, 1e-5)[0].flatten(1)
    assert grouped[2].eq(0).all()
    assert torch.equal(grouped[3].isnan().nonzero().flatten().cpu(), torch.arange(10))


def test_same_bits_on_every_run(gpu: torch.device) -> None:
    given = torch.randn(3, 9, 6, 50, device=gpu).unbind()
    affine = list(torch.randn(2, 6, device=gpu))
    first, second = (norm_results(adapter(given[0]), *given, affine, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kernel", [(2, 2), (1, 3), (3, 1), (4, 4)], ids=str)
def test_avg_pool_kernels(gpu: torch.device, kernel: tuple[int, int]) -> None:
    size = list(kernel)
    for dtype in DTYPES:
        for shape in ((2, 3, 9, 37), (1, 1, 4, 4), (0, 2, 4, 8)):
            x = torch.randn(shape, device=gpu).to(dtype).transpose(2, 3).contiguous().transpose(2, 3)
            grad = torch.randn_like(reference.avg_pool2d(x, size))
            sides = [
                [m.avg_pool2d(x.to(t), size), m.avg_pool2d_backward(grad.to(t), x.shape, size)]
                for m, t in ((adapter(x), dtype), (reference, dtype), (reference, torch.float64))
            ]
            for name, got, stock, exact in zip(("forward", "backward"), *sides, strict=True):
                assert_as_accurate(got, stock, exact, f"{name} {dtype}")


OPTIONS = ConvOptions((1, 1), (1, 1), (1, 1), False, (0, 0), 1)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 5, 8, 300])
def test_convolution_with_bias_and_activation_has_the_bits_of_torch(
    gpu: torch.device, channels: int, last: bool
) -> None:
    order = torch.channels_last if last else torch.contiguous_format
    for dtype in DTYPES:
        x = torch.randn(2, 3, 5, 4 if channels == 8 else 3, device=gpu).to(dtype).contiguous(memory_format=order)
        weight = torch.randn(channels, 3, 3, 3, device=gpu).to(dtype).contiguous(memory_format=order)
        bias = torch.randn(channels, device=gpu).to(dtype)
        bias[0] = -float("inf")
        bias[channels // 2] = float("nan")
        conv = adapter(x).conv_as_stock
        for activation, slope in (("relu", 0.3), ("leaky_relu", 0.3), ("leaky_relu", 0.0), ("none", 0.0)):
            got = conv(x, weight, bias, OPTIONS, activation, slope)
            # cuDNN adds the bias afterwards, too.
            plain = reference.conv(x, weight, None, OPTIONS) + bias.view(-1, 1, 1)
            want = F.relu(plain) if activation == "relu" or slope == 0 else F.leaky_relu(plain, slope)
            want = plain if activation == "none" else want
            close = 0 if activation != "none" and not cuts(dtype) else 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(got, want, rtol=close, atol=4 * close, equal_nan=True)
            # cuDNN turns float64 to planes.
            assert got.stride() == plain.stride()
        bare = conv(x, weight, None, OPTIONS, "relu")
        assert torch.equal(bare, F.relu(reference.conv(x, weight, None, OPTIONS)))
    volume = torch.randn(1, 2, 3, 3, 3, device=gpu)
    weight, bias = torch.randn(3, 2, 2, 2, 2, device=gpu), torch.randn(3, device=gpu)
    options = ConvOptions((1,) * 3, (0,) * 3, (1,) * 3, False, (0,) * 3, 1)
    got = adapter(volume).conv(volume, weight, bias, options, "leaky_relu", 0.2)
    torch.testing.assert_close(got, F.leaky_relu(F.conv3d(volume, weight, bias), 0.2))


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.2), ("none", 0.0)])
def test_input_gradients_are_masked_in_place(gpu: torch.device, activation: str, slope: float) -> None:
    x, grad = torch.randn(2, 4, 5, 5, device=gpu), torch.randn(2, 6, 5, 5, device=gpu)
    weight = torch.randn(6, 4, 3, 3, device=gpu)
    for values in (x, x.contiguous(memory_format=torch.channels_last)):
        arguments = (grad, weight, values, OPTIONS, activation, slope)
        got, want = (m.conv_input_grad(*arguments) for m in (adapter(x), reference))
        torch.testing.assert_close(got, want)


LAYERS: dict[str, tuple[tuple[int, ...], nn.Module]] = {
    "layer norm": ((2, 2, 2, 3), nn.LayerNorm([2, 3], elementwise_affine=False)),
    "layer norm, last": ((2, 2, 2, 3), nn.LayerNorm([2, 2, 3], elementwise_affine=False)),
    "group norm": ((2, 4, 3), nn.GroupNorm(2, 4, 0.1, affine=False)),
    "group norm, last": ((2, 4, 2, 2), nn.GroupNorm(2, 4, 0.1, affine=False)),
    "instance norm": ((2, 2, 5), nn.InstanceNorm1d(2, 0.1)),
    "pooling": ((1, 2, 4, 5), nn.AvgPool2d(2)),
    "activation": ((2, 7), nn.LeakyReLU(0.2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_exact_derivatives(gpu: torch.device, name: str) -> None:
    shape, layer = LAYERS[name]
    x = torch.randn(shape, device=gpu, dtype=torch.float64)
    x = (x.to(memory_format=torch.channels_last) if "last" in name else x).requires_grad_()
    run, input_gradient = layered(layer)
    torch.testing.assert_close(run(x), layer(x))
    assert torch.autograd.gradcheck(run, [x], fast_mode=True)
    assert torch.autograd.gradcheck(input_gradient, [x], fast_mode=True)
