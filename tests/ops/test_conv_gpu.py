"""Convolutions, transposed or not, by the kernels of the GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from oracle import assert_as_accurate, layouts
from torch import Tensor

import gankern
from gankern import backends
from gankern.ops import conv2d_act
from gankern.ops.conv_act import conv2d_acts, reference
from gankern.ops.conv_act import gpu as module
from gankern.ops.conv_act.reference import ConvOptions, Layer
from gankern.ops.conv_transpose_bn_act.convolution import Convolution, normalised

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    channels: int
    kernel: tuple[int, int]
    options: ConvOptions

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and bias."""
        channels = (self.shape[1], self.channels) if self.options.transposed else (self.channels, self.shape[1])
        shapes = [self.shape, (*channels, *self.kernel), (self.channels,)]
        x, w, b = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
        return x, w, b


def case(
    shape: tuple[int, int, int, int],
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    output_padding: tuple[int, int] | None = None,
) -> Case:
    """A transposed one where there is an output padding."""
    transposed = output_padding is not None
    return Case(
        shape, channels, kernel, ConvOptions(stride, padding, dilation, transposed, output_padding or (0, 0), 1)
    )


CASES = [
    case((2, 3, 9, 8), 5, (4, 4), (2, 2), (1, 1)),
    case((3, 16, 5, 4), 32, (3, 3), (1, 1), (1, 1)),
    case((2, 48, 4, 4), 1, (4, 4)),
    case((1, 17, 7, 5), 70, (3, 2), (3, 2), (1, 0), (2, 1)),
    case((5, 2, 1, 1), 3, (3, 3), (1, 1), (1, 1)),
    case((2, 16, 5, 6), 32, (4, 4), (2, 2), (1, 1), output_padding=(0, 0)),
    case((1, 40, 4, 4), 3, (4, 4), (2, 2), (1, 1), output_padding=(0, 0)),
    case((1, 17, 4, 3), 70, (3, 2), (3, 2), (1, 0), (2, 4), output_padding=(2, 1)),
    case((2, 7, 4, 3), 3, (1, 1), (3, 2), (0, 0), output_padding=(1, 1)),
    case((3, 20, 1, 1), 16, (4, 4), (2, 1), output_padding=(1, 0)),
]


def names(case: Case) -> str:
    return f"{'transposed' if case.options.transposed else 'plain'}-{case.shape}-{case.channels}"


def kernels(x: Tensor) -> Any:
    return backends.select("conv2d_act", x)


def passes(case: Case, dtype: torch.dtype, tensors: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """By stock: output, and the gradients of input and weight."""
    x, w, b = (t.to(dtype).requires_grad_() for t in tensors)
    output = reference.conv(x, w, b, case.options)
    return [output.detach(), *torch.autograd.grad(output, (x, w), grad.to(dtype))]


# float16 goes bfloat16's way, float64 mostly float32's.
@pytest.mark.parametrize(
    ("given", "dtype"),
    [(c, d) for i, c in enumerate(CASES) for d in (DTYPES if i == 5 else DTYPES[i % 2 :: 2])],
    ids=lambda x: names(x) if isinstance(x, Case) else str(x),
)
def test_kernels_are_as_accurate_as_stock(gpu: torch.device, given: Case, dtype: torch.dtype) -> None:
    x, w, b = given.tensors(dtype, gpu)
    run = kernels(x)
    output = run.conv(x, w, b, given.options)
    grad = torch.randn_like(output)
    ours = [output, run.conv_input_grad(grad, w, x, given.options), run.conv_weight_grad(grad, x, w, given.options)]
    stock, exact = (passes(given, kind, (x, w, b), grad) for kind in (dtype, torch.float64))
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert ours[2].stride() == w.stride()
    for name, *found in zip(("output", "input", "weight"), ours, stock, exact, strict=True):
        assert_as_accurate(*found, name)


@pytest.mark.parametrize("given", [CASES[1], CASES[7]], ids=names)
def test_tf32_where_torch_allows_it(gpu: torch.device, given: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    x, w, b = given.tensors(torch.float32, gpu)
    run = kernels(x)
    output = run.conv(x, w, b, given.options)
    grad = torch.randn_like(output)
    ours = [output, run.conv_input_grad(grad, w, x, given.options), run.conv_weight_grad(grad, x, w, given.options)]
    for got, exact in zip(ours, passes(given, torch.float64, (x, w, b), grad), strict=True):
        # Both factors have 11 bits, the last of which the GPU leaves out instead of rounding.
        assert (got - exact).norm() <= 2**-10 * exact.norm()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_way_to_memory(gpu: torch.device, dtype: torch.dtype, activation: str) -> None:
    """Scale, shift, bias and activation; and an activation's derivative by its output."""
    given = case((1, 16, 3, 3), 21, (4, 4), (2, 2), (1, 1), output_padding=(0, 0))
    x, w, b = given.tensors(dtype, gpu)
    scale, shift = torch.randn(2, 21, device=gpu).double() / 8
    results = []
    for kind in (dtype, torch.float64):
        plain = reference.conv(*(t.to(kind) for t in (x, w, b)), given.options)
        wide = plain if kind == torch.float64 else plain.float()
        z = wide * scale.to(wide.dtype)[:, None, None] + shift.to(wide.dtype)[:, None, None]
        results.append(reference.activate(z, activation, 0.3).to(kind))
    run = kernels(x)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    got = run.conv(x, w, b, given.options, activation, 0.3, scale.to(acc), shift.to(acc))
    assert_as_accurate(got, *results)

    grad = torch.randn_like(got)
    activated = reference.activate(x, activation, 0.3)
    results = []
    for kind in (dtype, torch.float64):
        plain = reference.conv_input_grad(grad.to(kind), w.to(kind), x.to(kind), given.options)
        results.append(reference.activate_backward(plain, activated.to(kind), activation, 0.3))
    got = run.conv_input_grad(grad, w, activated, given.options, activation, 0.3)
    assert_as_accurate(got, *results)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_special_values(gpu: torch.device) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 2e-4, 90.0], device=gpu).view(7, 1, 1, 1)
    weight, given = torch.ones(1, 1, 1, 1, device=gpu), ConvOptions((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    for activation in ("relu", "leaky_relu", "tanh"):
        want = reference.activate(x, activation, 0.3)
        got = kernels(x).conv(x, weight, None, given, activation, 0.3)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)
        want = reference.activate_backward(torch.ones_like(x), x, activation, 0.3)
        got = kernels(x).conv_input_grad(torch.ones_like(x), weight, x, given, activation, 0.3)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [CASES[0], CASES[5], CASES[7], CASES[8]], ids=names)
def test_statistics(gpu: torch.device, given: Case, dtype: torch.dtype) -> None:
    x, w, b = given.tensors(dtype, gpu)
    # The mean is far from zero: the variance must not be the difference of two rounded numbers.
    b += 1e4 if dtype != torch.bfloat16 else 1e3
    output, parts = kernels(x).conv_statistics(x, w, b, given.options)
    torch.testing.assert_close(output, kernels(x).conv(x, w, b, given.options))
    exact = reference.conv(x.double(), w.double(), b.double(), given.options).transpose(0, 1).flatten(1)
    first, second = parts.sum(0) / exact.size(1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(first, exact.mean(1), rtol=tolerance, atol=0)
    # By the rounding of results next to 1e4, and of squares next to 1e8 in float64.
    spread = 1e4 * tolerance * exact.std(1) + 1e-7
    assert ((second - first.square() - exact.var(1, correction=0)).abs() <= spread).all()
    assert torch.equal(parts, kernels(x).conv_statistics(x, w, b, given.options)[1])


def test_sums_over_many_pixels_are_cut_into_parts(gpu: torch.device) -> None:
    given = case((3, 2, 23, 30), 3, (3, 3), (1, 1), (1, 1))
    x, w, b = given.tensors(torch.float32, gpu)
    grad = torch.randn_like(reference.conv(x, w, b, given.options))
    stock, exact = (passes(given, kind, (x, w, b), grad)[2] for kind in (torch.float32, torch.float64))
    got = kernels(x).conv_weight_grad(grad, x, w, given.options)
    assert_as_accurate(got, stock, exact)
    assert torch.equal(got, kernels(x).conv_weight_grad(grad, x, w, given.options))


@pytest.mark.parametrize("transposed", [False, True])
def test_layouts(gpu: torch.device, transposed: bool) -> None:
    given = case((2, 3, 4, 5), 4, (3, 2), (2, 1), (1, 0), (1, 1), (0, 0) if transposed else None)
    x, w, b = given.tensors(torch.float32, torch.device("cpu"))
    want = reference.conv2d_acts(x, [Layer(w, b, given.options, "tanh", 0.0)])
    found = [list(layouts(t).values()) for t in (x, w, torch.randn_like(want))]
    for i, input in enumerate(found[0]):
        weight, grad = found[1][i - 1].to(gpu), found[2][i - 2].to(gpu)
        leaves = [t.detach().requires_grad_() for t in (input.to(gpu), weight, b.to(gpu))]
        results = []
        for function in (conv2d_acts, reference.conv2d_acts):
            output = function(leaves[0], [Layer(*leaves[1:], given.options, "tanh", 0.0)])
            results.append([output, *torch.autograd.grad(output, leaves, grad)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_storage_that_is_not_aligned(gpu: torch.device) -> None:
    storage = torch.randn(2 * 16 * 9 + 1, device=gpu)
    x, given = storage[1:].view(2, 3, 3, 16).permute(0, 3, 1, 2), ConvOptions((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    w = torch.randn(16 * 16 * 9 + 1, device=gpu)[1:].view(16, 3, 3, 16).permute(0, 3, 1, 2)
    want = reference.conv(x, w, None, given)
    torch.testing.assert_close(kernels(x).conv(x, w, None, given), want, rtol=1e-4, atol=1e-5)
    want = reference.conv_weight_grad(x, x, w, given)
    torch.testing.assert_close(kernels(x).conv_weight_grad(x, x, w, given), want, rtol=1e-4, atol=1e-5)


def test_a_row_of_layers_and_its_derivatives(gpu: torch.device) -> None:
    def row(dtype: torch.dtype) -> tuple[list[Tensor], list[Any]]:
        torch.manual_seed(1)
        first, second = (
            case((2, 2, 5, 5), 4, (3, 3), (2, 2), (1, 1)),
            case((2, 4, 3, 3), 3, (2, 2), output_padding=(0, 0)),
        )
        tensors = [*first.tensors(torch.float64, gpu), *second.tensors(torch.float64, gpu)[1:]]
        return [t.to(dtype).requires_grad_() for t in tensors], [first.options, second.options]

    def run(function: Any, dtype: torch.dtype, create_graph: bool) -> list[Tensor]:
        (x, w0, b0, w1, b1), (o0, o1) = row(dtype)
        output = function(x, [Layer(w0, b0, o0, "leaky_relu", 0.3), Layer(w1, b1, o1, "tanh", 0.0)])
        leaves = [x, w0, b0, w1, b1]
        grads = torch.autograd.grad(output.square().mean(), leaves, create_graph=create_graph)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves) if create_graph else ()
        return [output.detach(), *(g.detach() for g in grads), *again]

    for create_graph in (False, True):
        ours = run(conv2d_acts, torch.float32, create_graph)
        stock, exact = (run(reference.conv2d_acts, d, create_graph) for d in (torch.float32, torch.float64))
        for found in zip(ours, stock, exact, strict=True):
            assert_as_accurate(*found)


def test_gradcheck(gpu: torch.device) -> None:
    x, w, b = case((1, 2, 3, 3), 2, (2, 2)).tensors(torch.float64, gpu)
    for t in (x, w, b):
        t.requires_grad_()
    act = {"stride": 2, "padding": 1, "activation": "tanh"}
    assert torch.autograd.gradcheck(lambda *t: conv2d_act(*t, **act), (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *t: conv2d_act(*t, **act), (x, w, b), fast_mode=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_inference_is_one_kernel(gpu: torch.device, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = case((2, 5, 4, 4), 6, (4, 4), (2, 2), (1, 1), (1, 1), (0, 0) if transposed else None)
    x, w, _ = given.tensors(torch.bfloat16, gpu)
    scale, shift = torch.rand(6, device=gpu), torch.randn(6, device=gpu)
    stride, padding, dilation, _, output_padding, _ = given.options
    conv = Convolution(transposed, stride, padding, output_padding, dilation, 1)
    want = reference.conv(x.float(), w.float(), None, given.options) * scale[:, None, None] + shift[:, None, None]
    monkeypatch.setattr(torch.ops.aten, "convolution", None)
    got = normalised(conv, x, w, scale, shift, "relu", 0.0)
    torch.testing.assert_close(got, want.relu().bfloat16(), rtol=2e-2, atol=2e-2)


def test_empty_batches_and_what_is_refused(gpu: torch.device) -> None:
    x, w = torch.randn(0, 2, 4, 4, device=gpu), torch.randn(3, 2, 3, 3, device=gpu)
    assert conv2d_act(x, w).shape == (0, 3, 2, 2)
    with pytest.raises(gankern.BackendUnavailable, match="one group"):
        conv2d_act(torch.randn(1, 4, 4, 4, device=gpu), torch.randn(2, 2, 3, 3, device=gpu), groups=2)
    with pytest.raises(gankern.BackendUnavailable, match="negative_slope"):
        conv2d_act(torch.randn(1, 2, 4, 4, device=gpu), w, negative_slope=-1.0)


def test_sizes_beyond_32_bits_are_refused() -> None:
    plain = ConvOptions((2, 2), (1, 1), (1, 1), False, (0, 0), 1)
    module._check(module.problem((64, 128, 512, 512), (64, 64, 256, 256), (4, 4), plain, False))
    module._check(module.problem((1000, 512, 4, 4), (1000, 1, 1, 1), (4, 4), plain, False))
    for n, c, size in [(1 << 19, 1, 64), (2, 1024, 1024), (1, 1, 1 << 16)]:
        with pytest.raises(gankern.BackendUnavailable, match="32 bits"):
            module._check(module.problem((n, c, size, size), (n, 64, size // 2, size // 2), (4, 4), plain, False))


def test_autocast(gpu: torch.device) -> None:
    x, w, b = CASES[0].tensors(torch.float32, gpu)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    with torch.autocast(gpu.type, torch.bfloat16):
        got = conv2d_act(*leaves, stride=2, padding=1)
        grads = torch.autograd.grad(got.float().sum(), leaves)
    assert got.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.float32] * 3
    want = conv2d_act(*leaves, stride=2, padding=1)
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.1)


def test_auto_leaves_them_to_torch(gpu: torch.device) -> None:
    x, w = torch.randn(1, 2, 4, 4, device=gpu), torch.randn(3, 2, 3, 3, device=gpu)
    name = backends.requested()
    assert gankern.explain(conv2d_act, x, w).chosen == name
    with gankern.backend("auto"):
        found = gankern.explain(conv2d_act, x, w)
        assert found.chosen == ("reference" if gpu.type == "cuda" else "cpu")
        if name == "cuda" or gpu.type == "cuda":
            assert found.refused[name] == "not chosen by auto: not measured to be faster"
