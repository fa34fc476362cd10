"""Convolution + activation: kernels against float64, bits against stock, derivatives, layouts, bad input."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, layouts
from processors import avx512
from torch import Tensor, nn

import gankern
from gankern import backends
from gankern.ops import conv2d_act
from gankern.ops.conv_act import conv2d_acts, cpu, reference
from gankern.ops.conv_act.reference import ConvOptions, Layer

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

# Shape of the input, output channels, kernel, and (stride, padding, dilation).
SHAPES: list[tuple[tuple[int, int, int, int], int, tuple[int, int], Geometry]] = [
    ((2, 3, 9, 8), 5, (4, 4), ((2, 2), (1, 1), (1, 1))),
    ((3, 1, 7, 9), 16, (5, 3), ((2, 1), (2, 0), (2, 3))),
    ((1, 4, 5, 6), 1, (1, 1), ((3, 2), (0, 0), (1, 1))),
    ((2, 3, 9, 7), 66, (3, 2), ((1, 2), (2, 1), (2, 1))),
    ((2, 3, 4, 4), 33, (7, 7), ((1, 1), (3, 3), (1, 1))),
    ((9, 20, 8, 8), 70, (4, 4), ((2, 2), (1, 1), (1, 1))),
    ((2, 64, 40, 11), 48, (3, 3), ((1, 1), (1, 1), (1, 1))),
    ((3, 130, 5, 5), 17, (3, 2), ((3, 2), (0, 1), (1, 2))),
    ((2, 9, 3, 3), 7, (3, 3), ((1, 1), (4, 4), (1, 1))),
    ((2, 6, 8, 8), 100, (2, 2), ((3, 3), (0, 0), (1, 1))),
    ((4, 256, 4, 4), 1, (4, 4), ((1, 1), (0, 0), (1, 1))),
    ((40, 16, 2, 2), 300, (3, 3), ((1, 1), (1, 1), (1, 1))),
    ((1, 32, 70, 3), 32, (3, 3), ((2, 1), (1, 1), (1, 1))),
    # By minimal filtering, the first two of phases.
    ((9, 32, 26, 25), 48, (4, 4), ((2, 2), (1, 1), (1, 1))),
    ((4, 80, 33, 35), 32, (4, 4), ((2, 2), (0, 3), (1, 1))),
    ((4, 48, 17, 16), 80, (3, 3), ((1, 1), (1, 1), (1, 1))),
    ((9, 32, 13, 13), 64, (3, 3), ((1, 1), (0, 2), (1, 1))),
    ((1, 144, 33, 40), 128, (3, 3), ((1, 1), (1, 1), (1, 1))),
]


def options(geometry: Geometry) -> ConvOptions:
    return ConvOptions(*geometry, False, (0, 0), 1)


def arguments(geometry: Geometry) -> dict[str, Any]:
    return dict(zip(("stride", "padding", "dilation"), geometry, strict=True))


@pytest.mark.kernel
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "channels", "kernel", "geometry"), SHAPES)
def test_kernels_are_as_accurate_as_stock(
    shape: tuple[int, ...], channels: int, kernel: tuple[int, int], geometry: Geometry, last: bool, threads: int
) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(channels, shape[1], *kernel), torch.randn(channels)
    if last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    grad = torch.randn_like(F.conv2d(x, weight, None, *geometry))

    def stock(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        output = F.conv2d(*leaves, bias.to(dtype), *geometry)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))]

    ours = [
        cpu.conv(x, weight, bias, options(geometry)),
        cpu.conv_input_grad(grad, weight, x, options(geometry)),
        cpu.conv_weight_grad(grad, x, weight, options(geometry)),
    ]
    assert ours[2].stride() == weight.stride()
    for name, got, same, exact in zip(
        ("output", "input", "weight"), ours, stock(torch.float32), stock(torch.float64), strict=True
    ):
        assert_as_accurate(got, same, exact, name)


@pytest.mark.by_size
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_thin_gradients_are_torchs(memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where channels do not fill a vector."""
    shape, weight = (2, 8, 6, 6), torch.randn(16, 8, 4, 4).contiguous(memory_format=memory_format)
    x, grad, option = torch.randn(shape), torch.randn(2, 16, 3, 3), options(((2, 2), (1, 1), (1, 1)))

    def found() -> list[Tensor]:
        return [cpu.conv_input_grad(grad, weight, x, option), cpu.conv_weight_grad(grad, x, weight, option)]

    thin = found()
    monkeypatch.setattr(cpu, "_LEAVES_THIN", False)
    for got, want in zip(thin, found(), strict=True):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()
    for name in ("conv_input_grad", "conv_weight_grad"):
        monkeypatch.setattr(cpu.kernels, name, None)
    monkeypatch.setattr(cpu, "_LEAVES_THIN", True)
    found()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "channels", "kernel", "geometry"), [s for s in SHAPES if s[0][1] <= 4])
def test_input_gradient_of_few_channels(
    shape: tuple[int, ...],
    channels: int,
    kernel: tuple[int, int],
    geometry: Geometry,
    dtype: torch.dtype,
    threads: int,
) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(channels, shape[1], *kernel, dtype=dtype)
    grad = torch.randn_like(F.conv2d(x, weight, None, *geometry))

    def stock(kind: torch.dtype) -> Tensor:
        leaf = x.to(kind).requires_grad_()
        return torch.autograd.grad(F.conv2d(leaf, weight.to(kind), None, *geometry), leaf, grad.to(kind))[0]

    turned = (t.clone(memory_format=torch.channels_last) for t in (grad, weight))
    result = torch.empty_like(x, memory_format=torch.channels_last)
    cpu._stem(*turned, result, options(geometry))
    assert_as_accurate(result, stock(dtype), stock(torch.float64))


# Shape of the input, output channels, kernel, (stride, padding, dilation), and output padding.
TRANSPOSED: list[tuple[tuple[int, int, int, int], int, tuple[int, int], Geometry, tuple[int, int]]] = [
    ((3, 20, 5, 6), 10, (4, 4), ((2, 2), (1, 1), (1, 1)), (0, 0)),
    ((2, 7, 4, 3), 3, (4, 3), ((2, 1), (1, 0), (1, 1)), (1, 0)),
    ((2, 33, 6, 5), 66, (3, 2), ((3, 2), (1, 0), (1, 2)), (2, 1)),
    ((1, 16, 7, 7), 1, (5, 5), ((1, 1), (2, 2), (1, 1)), (0, 0)),
    ((40, 17, 1, 1), 20, (4, 4), ((2, 2), (0, 0), (1, 1)), (0, 0)),
    # By minimal filtering.
    ((9, 48, 12, 11), 32, (4, 4), ((2, 2), (1, 1), (1, 1)), (0, 1)),
    ((6, 32, 13, 15), 96, (4, 4), ((2, 2), (3, 0), (1, 1)), (0, 0)),
    ((3, 64, 20, 19), 32, (3, 3), ((1, 1), (1, 0), (1, 1)), (0, 0)),
]


@pytest.mark.kernel
@pytest.mark.parametrize("activation", ["none", "leaky_relu"])
@pytest.mark.parametrize(("shape", "channels", "kernel", "geometry", "output_padding"), TRANSPOSED)
def test_transposed_kernels_are_as_accurate_as_stock(
    shape: tuple[int, ...],
    channels: int,
    kernel: tuple[int, int],
    geometry: Geometry,
    output_padding: tuple[int, int],
    activation: str,
    threads: int,
) -> None:
    given = ConvOptions(*geometry, True, output_padding, 1)
    x, weight, bias = torch.randn(shape), torch.randn(shape[1], channels, *kernel), torch.randn(channels)
    assert cpu._geometry(x, weight, bias, given) is not None
    before = reference.activate(x, activation, 0.3)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf, w, b = (t.to(dtype).requires_grad_() for t in (x, weight, bias))
        output = reference.conv2d_acts(reference.activate(leaf, activation, 0.3), [Layer(w, b, given, activation, 0.3)])
        if not results:
            grad = torch.randn_like(output)
        # The gradient that a kernel gets is that of the convolution's output.
        raw = reference.conv2d_acts(reference.activate(leaf, activation, 0.3), [Layer(w, b, given, "none", 0.0)])
        results.append([output.detach(), *torch.autograd.grad(raw, (leaf, w), grad.to(dtype))])
    ours = [
        cpu.conv(before, weight, bias, given, activation, 0.3),
        cpu.conv_input_grad(grad, weight, before, given, activation, 0.3),
        cpu.conv_weight_grad(grad, before, weight, given),
    ]
    for name, got, same, exact in zip(("output", "input", "weight"), ours, *results, strict=True):
        assert_as_accurate(got, same, exact, name)


@pytest.mark.kernel
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [5, 14])
def test_factor_and_offset_on_the_way_to_memory(transposed: bool, size: int) -> None:
    for channels, (kernel, stride) in itertools.product((3, 48), ((3, 1), (4, 2))):
        given = ConvOptions((stride, stride), (1, 1), (1, 1), transposed, (0, 0), 1)
        x, scale, shift = torch.randn(8, 32, size, size), torch.randn(channels), torch.randn(channels)
        weight = torch.randn(*((32, channels) if transposed else (channels, 32)), kernel, kernel)
        for activation in ("relu", "tanh"):
            plain = cpu.conv(x, weight, None, given)
            want = reference.activate(plain * scale[:, None, None] + shift[:, None, None], activation, 0.0)
            got = cpu.conv(x, weight, None, given, activation, 0.0, scale, shift)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(cpu.kernels is None or cpu.kernels.cpu_isa() != "avx512", reason="oneDNN's order is AVX-512's")
@pytest.mark.parametrize("n", [1, 3, 16, 40])
@pytest.mark.parametrize(
    ("shape", "channels", "kernel", "geometry"),
    [
        *[s for s in SHAPES if s[2] != (1, 1)],
        ((1, 64, 32, 32), 64, (3, 3), ((1, 1), (1, 1), (1, 1))),
        ((1, 128, 8, 8), 256, (4, 4), ((2, 2), (1, 1), (1, 1))),
        ((1, 3, 64, 64), 32, (5, 5), ((2, 2), (2, 2), (1, 1))),
    ],
)
def test_output_has_the_bits_of_stock(
    shape: tuple[int, ...], channels: int, kernel: tuple[int, int], geometry: Geometry, n: int
) -> None:
    x, weight, bias = torch.randn(n, *shape[1:]), torch.randn(channels, shape[1], *kernel), torch.randn(channels)
    assert torch.equal(cpu.conv_as_stock(x, weight, bias, options(geometry)), F.conv2d(x, weight, bias, *geometry))
    turned = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(cpu.conv_as_stock(turned, weight, None, options(geometry)), F.conv2d(x, weight, None, *geometry))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "none"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_derivatives(activation: str, with_bias: bool) -> None:
    geometry = ((2, 1), (1, 2), (1, 1))
    tensors = [torch.randn(3, 5, 9, 8), torch.randn(6, 5, 4, 3), torch.randn(6)][: 2 + with_bias]

    def results(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        output = function(*leaves)
        grads = torch.autograd.grad(output.square().mean(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        return [output.detach(), *(g.detach() for g in grads), *again]

    def ours(*leaves: Tensor) -> Tensor:
        return conv2d_act(*leaves, **arguments(geometry), activation=activation, negative_slope=0.3)

    def stock(*leaves: Tensor) -> Tensor:
        given = leaves if with_bias else (*leaves, None)
        return reference.conv2d_acts(given[0], [reference.Layer(*given[1:], options(geometry), activation, 0.3)])

    for got, same, exact in zip(
        results(ours, torch.float32), results(stock, torch.float32), results(stock, torch.float64), strict=True
    ):
        assert_as_accurate(got, same, exact)


@pytest.mark.kernel
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh"])
@pytest.mark.parametrize(("shape", "channels", "kernel", "geometry"), SHAPES)
def test_activation_on_the_way_to_memory(
    shape: tuple[int, ...], channels: int, kernel: tuple[int, int], geometry: Geometry, activation: str
) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(channels, shape[1], *kernel), torch.randn(channels)
    given = options(geometry)
    for conv in (cpu.conv, cpu.conv_as_stock):
        plain = conv(x, weight, bias, given)
        want = reference.activate(plain, activation, 0.3)
        assert torch.equal(conv(x, weight, bias, given, activation, 0.3), want)
    grad = torch.randn_like(plain)
    activated = reference.activate(x, activation, 0.3)
    grad_input = cpu.conv_input_grad(grad, weight, activated, given)
    want = reference.activate_backward(grad_input, activated, activation, 0.3)
    got = cpu.conv_input_grad(grad, weight, activated, given, activation, 0.3)
    # tanh's derivative may be contracted otherwise.
    torch.testing.assert_close(got, want, rtol=1e-6 if activation == "tanh" else 0, atol=1e-6 * want.abs().max())


def row(transposed: bool) -> list[Layer]:
    def layer(k: int, c: int, size: int, padding: int, activation: str, bias: bool) -> Layer:
        given = ConvOptions((1, 2), (padding, padding), (1, 1), transposed, (0, int(transposed)), 1)
        channels = (c, k) if transposed else (k, c)
        tensors = torch.randn(*channels, size, size) / (c * size), torch.randn(k) if bias else None
        return Layer(*tensors, given, activation, 0.3)

    return [layer(16, 2, 3, 1, "relu", True), layer(5, 16, 4, 2, "tanh", False), layer(20, 5, 3, 0, "leaky_relu", True)]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1, 2), (0, 1, 2, 3), (0, 4, 5), (1, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_layers_in_a_row(frozen: tuple[int, ...], create_graph: bool, transposed: bool) -> None:
    layers, x = row(transposed), torch.randn(3, 2, 9, 4 if transposed else 30)

    def gradients(function: Any, dtype: torch.dtype) -> list[Tensor]:
        tensors = [t for t in (x, *(t for layer in layers for t in layer[:2])) if t is not None]
        leaves = [t.to(dtype).requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
        rest = iter(leaves[1:])
        given = [layer._replace(weight=next(rest), bias=None if layer.bias is None else next(rest)) for layer in layers]
        output = function(leaves[0], given)
        wanted = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(output.square().mean(), wanted, create_graph=create_graph)
        if create_graph:
            grads = torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
        return [output.detach(), *grads]

    for got, same, exact in zip(
        gradients(conv2d_acts, torch.float32),
        gradients(reference.conv2d_acts, torch.float32),
        gradients(reference.conv2d_acts, torch.float64),
        strict=True,
    ):
        assert_as_accurate(got, same, exact)


@avx512
def test_first_order_gradients_are_the_kernels() -> None:
    x, weight, bias = torch.randn(4, 3, 8, 8), torch.randn(16, 3, 4, 4), torch.randn(16)
    for want in ([True, True, True], [False, True, False], [True, False, False], [False, False, True]):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight, bias), want, strict=True)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            conv2d_act(*leaves, stride=2, padding=1).sum().backward()
        count = {e.key: e.count for e in profile.key_averages()}
        assert "aten::convolution_backward" not in count
        assert [count.get(f"gankern::conv{k}", 0) for k in ("", "_input_grad", "_weight_grad")] == [
            1,
            *map(int, want[:2]),
        ]
        assert [t.grad is not None for t in leaves] == want


def test_every_layout() -> None:
    x, weight = torch.randn(2, 5, 6, 7), torch.randn(8, 5, 3, 3)
    for name, given in layouts(x).items():
        for other, w in layouts(weight).items():
            got, want = conv2d_act(given, w, padding=1), F.leaky_relu(F.conv2d(given, w, padding=1), 0.2)
            torch.testing.assert_close(got, want, msg=f"{name}, {other}", rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"groups": 2},
        {"n": 0},
        {"slope": -0.5},
        {"backend": "reference"},
        {"autocast": True},
    ],
    ids=str,
)
def test_what_has_no_kernel_is_stock(case: dict[str, Any]) -> None:
    if cpu.has_matrix_units() and (case.get("dtype") == torch.bfloat16 or "autocast" in case):
        pytest.skip("this processor has a kernel for it")
    dtype, groups, slope = case.get("dtype", torch.float32), case.get("groups", 1), case.get("slope", 0.2)
    x = torch.randn(case.get("n", 2), 4, 6, 6, dtype=dtype)
    weight, bias = torch.randn(8, 4 // groups, 3, 3, dtype=dtype), torch.randn(8, dtype=dtype)
    with (
        gankern.backend(case.get("backend", "auto")),
        torch.autocast("cpu", torch.bfloat16, enabled=case.get("autocast", False)),
    ):
        got = conv2d_act(x, weight, bias, groups=groups, negative_slope=slope)
        want = F.leaky_relu(F.conv2d(x, weight, bias, groups=groups), slope)
    assert torch.equal(got, want)


def test_a_backend_asked_for_by_name_refuses() -> None:
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
    with gankern.backend("cpu"):
        with pytest.raises(backends.BackendUnavailable, match="float32"):
            conv2d_act(x.double(), weight.double())
        with pytest.raises(backends.BackendUnavailable, match="one group; got 2"):
            conv2d_act(x, weight[:, :1], groups=2)
        with pytest.raises(backends.BackendUnavailable, match="negative_slope"):
            conv2d_act(x, weight, negative_slope=-1.0)


def test_bias_of_any_stride() -> None:
    x, weight, bias = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(8)[::2]
    torch.testing.assert_close(conv2d_act(x, weight, bias), F.leaky_relu(F.conv2d(x, weight, bias), 0.2))


def test_operators() -> None:
    x, weights, biases = torch.randn(2, 3, 8, 8), [torch.randn(16, 3, 4, 4), torch.randn(5, 16, 3, 3)], [None] * 2
    rest = [2, 2, 1, 1, 1, 1, 0, 0, 0] * 2, ["leaky_relu", "tanh"], [0.2, 0.0]
    forward, backward = torch.ops.gankern.conv2d_acts.default, torch.ops.gankern.conv2d_acts_backward.default
    torch.library.opcheck(forward, (x, weights, biases, *rest))
    torch.library.opcheck(forward, (x, weights, [torch.randn(16), torch.randn(5)], *rest))
    narrow, up = torch.randn(2, 16, 3, 3), [2, 2, 1, 1, 1, 1, 1, 0, 1]
    torch.library.opcheck(forward, (narrow, weights[:1], [torch.randn(3)], up, ["relu"], [0.0]))
    (widened,) = forward(narrow, weights[:1], [None], up, ["relu"], [0.0])
    given = (torch.randn_like(widened), narrow, [widened], weights[:1], up, ["relu"], [0.0], True, [True], [True])
    torch.library.opcheck(backward, given)
    outputs = forward(x, weights, biases, *rest)
    for want in ((True, [True, True], [True, True]), (False, [True, False], [False, True])):
        given = (torch.randn_like(outputs[-1]), x, outputs, weights, *rest, *want)
        torch.library.opcheck(backward, given)


def test_compiles_into_one_graph() -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(16, 3, 4, 4, requires_grad=True)
    compiled = torch.compile(lambda w: conv2d_act(x, w, stride=2, padding=1).square().mean(), fullgraph=True)
    compiled(weight).backward()
    (want,) = torch.autograd.grad(conv2d_act(x, weight, stride=2, padding=1).square().mean(), weight)
    torch.testing.assert_close(weight.grad, want)


def critic() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(16, 32, 4, 2, 1, bias=False),
        nn.ReLU(),
        nn.Dropout2d(0.0),
        nn.Conv2d(32, 1, 4),
        nn.Flatten(0),
    )


def test_other_modules_get_their_own_layout() -> None:
    class View(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.size(0), -1)

    stock = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), View(), nn.Linear(16 * 36, 1))
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(gankern.fuse(copy.deepcopy(stock))(x), stock(x))


GOOD: dict[str, Any] = {"input": torch.ones(1, 2, 4, 4), "weight": torch.ones(3, 2, 3, 3)}


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"input": 3}, TypeError, "input must be a Tensor; got int"),
        ({"input": torch.ones(2, 4, 4)}, ValueError, r"input must have shape \(N, C_in, H, W\); got \(2, 4, 4\)"),
        ({"weight": torch.ones(3, 2, 3)}, ValueError, "weight must have shape"),
        ({"weight": torch.ones(3, 4, 3, 3)}, ValueError, r"weight must have input's 2 channels.*got \(3, 4, 3, 3\)"),
        ({"weight": torch.ones(3, 2, 3, 3).double()}, TypeError, "weight must have input's dtype"),
        ({"weight": torch.ones(3, 2, 5, 5)}, ValueError, "input must be at least as large as the kernel"),
        ({"bias": torch.ones(2)}, ValueError, r"bias must have shape \(3,\); got \(2,\)"),
        ({"stride": 0}, ValueError, "stride must be at least 1; got 0"),
        ({"padding": 1.5}, TypeError, "padding must be an int or a pair of ints; got 1.5"),
        ({"padding": "full"}, ValueError, "padding must be numbers, 'valid' or 'same'; got 'full'"),
        ({"activation": "gelu"}, ValueError, "activation must be one of .*; got 'gelu'"),
        ({"negative_slope": "x"}, TypeError, "negative_slope must be a number"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
    ],
)
def test_bad_input_is_named(bad: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        conv2d_act(**(GOOD | bad))
