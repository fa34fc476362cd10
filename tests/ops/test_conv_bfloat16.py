"""Convolutions in bfloat16 on the matrix units: against float64 and stock, derivatives, autocast, special values."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate, layouts
from torch import Tensor, nn

import gankern
from gankern import backends
from gankern.ops import conv2d_act
from gankern.ops.conv_act import conv2d_acts, cpu, reference
from gankern.ops.conv_act.reference import ConvOptions, Layer

pytestmark = pytest.mark.skipif(not cpu.has_matrix_units(), reason="needs a processor with matrix units (AMX)")

Pair = tuple[int, int]


@pytest.fixture(autouse=True)
def kernels_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_MANY_PIXELS", 1 << 62)


# Sizes of the input, kernel, stride, padding, dilation and output padding.
GEOMETRIES: list[tuple[Pair, Pair, Pair, Pair, Pair, Pair]] = [
    ((4, 4), (4, 4), (2, 2), (1, 1), (1, 1), (0, 0)),
    ((7, 9), (5, 3), (2, 1), (2, 0), (2, 3), (1, 0)),
    ((5, 6), (1, 1), (3, 2), (0, 0), (1, 1), (2, 1)),
    ((19, 20), (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)),
    ((3, 34), (4, 3), (3, 2), (2, 1), (1, 2), (1, 1)),
    ((1, 1), (4, 4), (2, 2), (2, 2), (1, 1), (0, 0)),
]
# Images, channels of the input and of the output.
CHANNELS = [(1, 1, 1), (2, 3, 17), (3, 33, 100), (17, 64, 32), (33, 100, 3), (35, 32, 80), (5, 544, 33)]


def given(
    geometry: tuple[Pair, ...], n: int, channels: int, out_channels: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor, ConvOptions]:
    size, kernel, stride, padding, dilation, output_padding = geometry
    options = ConvOptions(stride, padding, dilation, transposed, output_padding if transposed else (0, 0), 1)
    rows = (channels, out_channels) if transposed else (out_channels, channels)
    weight = torch.randn(*rows, *kernel) / (channels * kernel[0] * kernel[1]) ** 0.5
    # Values of bfloat16, so that all compute with the same.
    x = torch.randn(n, channels, *size)
    return x.bfloat16(), weight.bfloat16().float(), torch.randn(out_channels).bfloat16().float(), options


def fits(x: Tensor, weight: Tensor, options: ConvOptions) -> bool:
    return min(reference.conv_shape(x.shape, weight.shape, options)) > 0


def assert_rounded_once(got: Tensor, exact: Tensor, what: str = "") -> None:
    """No error but the rounding of the result: products of bfloat16 are exact in float32, their sums nearly so."""
    assert exact.dtype == torch.float64
    rounding = (exact.to(got.dtype).double() - exact).norm()
    assert (got.double() - exact).norm() <= 1.01 * rounding + 1e-6 * exact.norm(), what


@pytest.mark.kernel
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_kernels_round_once(
    channels: tuple[int, int, int], geometry: tuple[Pair, ...], transposed: bool, threads: int
) -> None:
    x, weight, bias, options = given(geometry, *channels, transposed)
    if not fits(x, weight, options):
        pytest.skip("smaller than the kernel")
    exact = reference.conv(x.double(), weight.double(), bias.double(), options)
    grad = torch.randn_like(exact).bfloat16()
    grad_input = reference.conv_input_grad(grad.double(), weight.double(), x.double(), options)
    grad_weight = reference.conv_weight_grad(grad.double(), x.double(), weight.double(), options)
    for last, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        format = torch.channels_last if last else torch.contiguous_format
        w = weight.to(dtype).contiguous(memory_format=format)
        if cpu._geometry(x, w, bias, options) is None:
            assert transposed and reference.conv_shape(exact.shape, w.shape, options._replace(transposed=False))
            continue
        assert_rounded_once(cpu.conv(x, w, bias, options), exact, "output")
        assert_rounded_once(cpu.conv_input_grad(grad, w, x, options), grad_input, "input")
        got = cpu.conv_weight_grad(grad, x, w, options)
        assert got.dtype == dtype
        assert got.stride() == w.stride()
        assert_rounded_once(got, grad_weight, "weight")


@pytest.mark.kernel
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh"])
@pytest.mark.parametrize("transposed", [False, True])
def test_finish_on_the_way_to_memory(transposed: bool, activation: str) -> None:
    for geometry, channels in itertools.product(GEOMETRIES[:4], [(2, 32, 3), (3, 20, 50), (33, 3, 35)]):
        x, weight, bias, options = given(geometry, *channels, transposed)
        if cpu._geometry(x, weight, bias, options) is None:
            continue
        plain = reference.conv(x.double(), weight.double(), bias.double(), options)
        assert_rounded_once(
            cpu.conv(x, weight, bias, options, activation, 0.3), reference.activate(plain, activation, 0.3)
        )
        scale, shift = torch.randn(2, plain.size(1))
        affine = (plain - bias[:, None, None]) * scale[:, None, None] + shift[:, None, None]
        assert_rounded_once(
            cpu.conv(x, weight, None, options, activation, 0.3, scale, shift),
            reference.activate(affine, activation, 0.3),
        )
        grad = torch.randn_like(plain).bfloat16()
        activated = reference.activate(x, activation, 0.3)
        exact = (activated.double(), activation, 0.3)
        want = reference.conv_input_grad(grad.double(), weight.double(), exact[0], options, *exact[1:])
        got = cpu.conv_input_grad(grad, weight, activated, options, activation, 0.3)
        assert_rounded_once(got, want)


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], second: bool) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    found = torch.autograd.grad(output.float().square().mean(), leaves, create_graph=second)
    if second:
        found = torch.autograd.grad(sum(g.float().square().sum() for g in found), leaves)
    return [output.detach(), *found]


def row(transposed: bool) -> list[Layer]:
    def layer(k: int, c: int, size: int, stride: int, activation: str) -> Layer:
        options = ConvOptions((stride, stride), (1, 1), (1, 1), transposed, (0, 0), 1)
        weight = torch.randn(*((c, k) if transposed else (k, c)), size, size) / (c**0.5 * size)
        return Layer(weight, torch.randn(k), options, activation, 0.3)

    return [layer(32, 5, 3, 1, "relu"), layer(20, 32, 4, 2, "leaky_relu"), layer(3, 20, 4, 2, "tanh")]


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_as_accurate_as_stock(transposed: bool, autocast: bool, second: bool) -> None:
    layers = row(transposed)
    tensors = [torch.randn(4, 5, 12, 11), *(t for layer in layers for t in layer[:2] if t is not None)]
    tensors = [t.bfloat16() if not autocast else t.bfloat16().float() for t in tensors]

    def run(function: Callable[..., Tensor], cast: bool) -> Callable[..., Tensor]:
        def convolve(x: Tensor, *parameters: Tensor) -> Tensor:
            rest = iter(parameters)
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                return function(x, [layer._replace(weight=next(rest), bias=next(rest)) for layer in layers])

        return convolve

    ours = gradients(run(conv2d_acts, autocast), tensors, second)
    stock = gradients(run(reference.conv2d_acts, autocast), tensors, second)
    exact = gradients(run(reference.conv2d_acts, False), [t.double() for t in tensors], second)
    assert ours[0].dtype == torch.bfloat16
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    # A second derivative of three biases has a unit in the last place by chance.
    for i, found in enumerate(zip(ours, stock, exact, strict=True)):
        assert_as_accurate(*found, str(i), units=1 if second else 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_models_are_as_accurate_as_stock(dtype: torch.dtype, training: bool) -> None:
    stock = nn.Sequential(
        nn.ConvTranspose2d(100, 64, 4, 1, 0, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1),
        nn.BatchNorm2d(32),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(32, 3, 4, 2, 1),
        nn.Tanh(),
        nn.Conv2d(3, 40, 4, 2, 1),
        nn.BatchNorm2d(40),
        nn.ReLU(),
    ).train(training)
    exact = copy.deepcopy(stock).double()
    stock = stock.to(dtype)
    ours = gankern.fuse(copy.deepcopy(stock))
    x = torch.randn(8, 100, 1, 1).to(dtype)
    found = []
    for model in (ours, stock, exact):
        given = x.double() if model is exact else x
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact and dtype == torch.float32):
            with torch.no_grad():
                inference = model(given)
            output = model(given)
        output.sum(dtype=torch.float64).add(output.double().square().sum()).backward()
        found.append([inference, output.detach(), *(p.grad for p in model.parameters())])
    for results in zip(*found, strict=True):
        assert_as_accurate(*results, units=0.5)


def test_kernels_run_under_autocast_and_in_bfloat16() -> None:
    x, weight, bias = torch.randn(4, 8, 9, 9), torch.randn(16, 8, 4, 4), torch.randn(16)
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
            gankern.backend("cpu"),
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                output = conv2d_act(*leaves, stride=2, padding=1)
            output.sum().backward()
        assert output.dtype == torch.bfloat16
        assert [t.grad.dtype for t in leaves] == [dtype] * 3
        count = {e.key: e.count for e in profile.key_averages()}
        assert [count.get(f"gankern::conv{k}", 0) for k in ("", "_input_grad", "_weight_grad")] == [1, 1, 1]
        assert not any("aten::convolution" in key or "mkldnn" in key for key in count)


def test_weight_gradient_under_autocast_keeps_float32() -> None:
    x, weight = torch.randn(4, 64, 9, 9).bfloat16(), torch.randn(16, 64, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = conv2d_act(x, weight, activation="none")
    grad = torch.randn_like(output)
    (got,) = torch.autograd.grad(output, weight, grad)
    options = ConvOptions((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    want = reference.conv_weight_grad(grad.double(), x.double(), weight.detach().double(), options)
    assert (got.double() - want).norm() <= 1e-6 * want.norm()


def test_every_layout() -> None:
    x, weight = torch.randn(3, 5, 6, 7).bfloat16(), torch.randn(8, 5, 3, 3).bfloat16()
    with gankern.backend("cpu"):
        for (name, t), (other, w) in itertools.product(layouts(x).items(), layouts(weight).items()):
            want = F.leaky_relu(F.conv2d(t.double(), w.double(), padding=1), 0.2)
            assert_rounded_once(conv2d_act(t, w, padding=1), want, f"{name}, {other}")
            leaves = [t.detach().requires_grad_(), w.detach().requires_grad_()]
            exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
            for grad in layouts(torch.randn_like(want).bfloat16()).values():
                got = torch.autograd.grad(conv2d_act(*leaves, padding=1, activation="none"), leaves, grad)
                for a, b in zip(
                    got, torch.autograd.grad(F.conv2d(*exact, padding=1), exact, grad.double()), strict=True
                ):
                    assert_rounded_once(a, b, f"{name}, {other}")


def test_no_images() -> None:
    x, weight = torch.randn(0, 4, 6, 6).bfloat16().requires_grad_(), torch.randn(8, 4, 3, 3).bfloat16().requires_grad_()
    output = conv2d_act(x, weight)
    assert output.shape == (0, 8, 4, 4)
    grads = torch.autograd.grad(output.sum(), (x, weight))
    assert grads[0].shape == x.shape
    assert not grads[1].any()


@pytest.mark.kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [(2, 64, 33), (33, 32, 64), (2, 5, 20), (3, 48, 3)], ids=str)
def test_special_values_reach_what_sees_them(channels: tuple[int, int, int], transposed: bool, value: float) -> None:
    for geometry in GEOMETRIES[:4]:
        x, weight, _, options = given(geometry, *channels, transposed)
        weight = weight.abs() + 0.1
        if cpu._geometry(x, weight, None, options) is None:
            continue
        x[-1, 1, -1, -2] = value
        want = reference.conv(x.float(), weight, None, options)
        assert torch.equal(cpu.conv(x, weight, None, options).isfinite(), want.isfinite())
        grad = torch.randn(want.shape).bfloat16()
        grad[0, -1, 0, 1] = value
        got = cpu.conv_input_grad(grad, weight, x, options)
        want = reference.conv_input_grad(grad.float(), weight, x.float(), options)
        assert torch.equal(got.isfinite(), want.isfinite())
        # The side without the stride is multiplied with zeros where the other ends: within its channel.
        narrow, wide = (x, grad) if transposed else (grad, x)
        for kept in (narrow, wide):
            a, b = (torch.where(t.isfinite() | (t is kept), t, 1) for t in (grad, x))
            got = cpu.conv_weight_grad(a, b, weight, options).isfinite()
            want = reference.conv_weight_grad(a.float(), b.float(), weight, options).isfinite()
            if kept is narrow:
                got, want = (t.flatten(1).all(1) for t in (got, want))
            assert torch.equal(got, want)


def everything() -> list[Tensor]:
    torch.manual_seed(1)
    found = []
    for channels, transposed in itertools.product([(3, 33, 100), (33, 64, 32), (5, 3, 64), (4, 64, 3)], (False, True)):
        x, weight, bias, options = given(GEOMETRIES[3], *channels, transposed)
        output = cpu.conv(x, weight, bias, options, "tanh")
        grad = torch.randn(output.shape).bfloat16()
        found += [output, cpu.conv_input_grad(grad, weight, x, options), cpu.conv_weight_grad(grad, x, weight, options)]
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.kernel
def test_same_bits_on_every_run(threads: int) -> None:
    first = everything()
    a, b = torch.randn(2, 100, 100).bfloat16()
    product = a @ b
    for _ in range(4):
        # torch's products set the tiles up otherwise.
        assert torch.equal(a @ b, product)
        assert same(everything(), first)


def test_images_have_the_same_bits_with_any_number_of_threads() -> None:
    runs = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append([t for i, t in enumerate(everything()) if i % 3 < 2])
    torch.set_num_threads(before)
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_two_python_threads() -> None:
    x, weight, bias, options = given(GEOMETRIES[0], 33, 64, 32, True)
    a, b = torch.randn(2, 100, 100).bfloat16()

    def work(_: int) -> tuple[Tensor, Tensor]:
        return cpu.conv(x, weight, bias, options), a @ b

    want = work(0)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(work, range(40)):
            assert same(list(found), list(want))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_fork() -> None:
    code = """
import os, torch
torch.set_num_threads(1)
from gankern.ops import conv2d_act
x, w = torch.randn(4, 40, 9, 9).bfloat16(), torch.randn(33, 40, 3, 3).bfloat16()
want = conv2d_act(x, w)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(conv2d_act(x, w), want) else 1)
assert os.waitpid(child, 0)[1] == 0 and torch.equal(conv2d_act(x, w), want)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_lesser_instruction_sets_have_none(isa: str) -> None:
    code = """
import torch, gankern
from gankern.ops.conv_act import cpu
assert not cpu.has_matrix_units()
x, w = torch.randn(2, 4, 6, 6).bfloat16(), torch.randn(8, 4, 3, 3).bfloat16()
want = torch.nn.functional.leaky_relu(torch.nn.functional.conv2d(x, w), 0.2)
assert torch.equal(gankern.ops.conv2d_act(x, w), want)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "GANKERN_CPU_ISA": isa})


def test_operators() -> None:
    x, weights = torch.randn(2, 3, 8, 8).bfloat16(), [torch.randn(16, 3, 4, 4), torch.randn(5, 16, 3, 3)]
    rest = [2, 2, 1, 1, 1, 1, 0, 0, 0] * 2, ["leaky_relu", "tanh"], [0.2, 0.0]
    forward, backward = torch.ops.gankern.conv2d_acts.default, torch.ops.gankern.conv2d_acts_backward.default
    for given in (weights, [w.bfloat16() for w in weights]):
        torch.library.opcheck(forward, (x, given, [torch.randn(16), None], *rest))
        outputs = forward(x, given, [None, None], *rest)
        for want in ((True, [True, True], [True, True]), (False, [True, False], [False, True])):
            torch.library.opcheck(backward, (torch.randn_like(outputs[-1]), x, outputs, given, *rest, *want))


def test_what_is_refused() -> None:
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    with gankern.backend("cpu"):
        with (
            torch.autocast("cpu", torch.float16),
            pytest.raises(backends.BackendUnavailable, match="autocast to be off, or to bfloat16"),
        ):
            conv2d_act(x, weight)
        with pytest.raises(backends.BackendUnavailable, match="float32, or bfloat16 on a processor"):
            conv2d_act(x.half(), weight.half())
    with gankern.backend("reference"):
        got = conv2d_act(x.bfloat16(), weight.bfloat16())
        assert torch.equal(got, F.leaky_relu(F.conv2d(x.bfloat16(), weight.bfloat16()), 0.2))


def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_MANY_PIXELS", 1 << 12)

    def ours(n: int, channels: int, out_channels: int, kernel: int, stride: int) -> list[bool]:
        given = ConvOptions((stride, stride), (1, 1), (1, 1), False, (0, 0), 1)
        geometry = cpu._fit(torch.Size((n, channels, 32, 32)), (out_channels, channels, kernel, kernel), None, given)
        taken = [not cpu._is_slower(torch.bfloat16, geometry, (kernel, kernel), widens) for widens in (False, True)]
        return [*taken, not cpu._is_slower_weight(torch.bfloat16, geometry, (kernel, kernel))]

    assert ours(64, 64, 64, 3, 1) == [False] * 3, "a stride of one"
    assert ours(4, 64, 64, 3, 1) == [True] * 3, "few pixels"
    assert ours(64, 64, 64, 1, 1) == [True] * 3, "a plain product"
    assert ours(64, 64, 128, 4, 2) == [True] * 3
    assert ours(64, 3, 64, 4, 2) == [True] * 3
    assert ours(64, 3, 32, 4, 2) == [False, True, False], "few channels"
    x, weight = torch.randn(64, 8, 16, 16).bfloat16(), torch.randn(8, 8, 3, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = conv2d_act(x, weight.float(), activation="none", padding=1)
    assert torch.equal(got, F.conv2d(x, weight, padding=1))


def test_compiles_into_one_graph() -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(16, 3, 4, 4, requires_grad=True)

    def loss(w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return conv2d_act(x, w, stride=2, padding=1).float().square().mean()

    torch.compile(loss, fullgraph=True)(weight).backward()
    (want,) = torch.autograd.grad(loss(weight), weight)
    assert (weight.grad - want).norm() <= 0.02 * want.norm()
