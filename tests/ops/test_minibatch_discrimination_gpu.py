"""Minibatch discrimination and L1 distances by the kernels of the GPU."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from oracle import assert_as_accurate, layouts, run
from torch import Tensor

from gankern import _triton, backends, ops
from gankern.ops.minibatch_discrimination import parts, reference

# Samples, features, kernel dims: around the sizes of a warp and a tile, and of the dims that fit in registers. Triton's
# interpreter takes milliseconds for each sample that a sample is compared to.
SMALL = [(1, 1, 1), (4, 33, 3), (9, 2, 13), (5, 2, 37)]
LARGE = [(5, 17, 3), (33, 2, 5), (18, 1, 8), (65, 3, 13), (34, 2, 37), (20, 16, 70), (150, 1, 4)]
CASES = [
    *((shape, torch.float32) for shape in SMALL + LARGE),
    ((33, 1, 5), torch.float64),
    ((5, 2, 19), torch.float64),
    *(((9, 3, 7), dtype) for dtype in (torch.bfloat16, torch.float16)),
]
OPS = [(ops.minibatch_discrimination, reference.minibatch_discrimination), (ops.l1_distance, reference.l1_distance)]


def batch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Samples near enough for exponentials that are not all zero, one in five equal to another."""
    m = torch.randn(shape, dtype=torch.float64, device=device) / max(shape[2], 1)
    m[5::5] = m[:1]
    return m.to(dtype)


def given(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[Callable[..., Tensor], list[Tensor]]:
    """m, a gradient and a cotangent of each op."""
    n, b, _ = shape
    m = batch(shape, dtype, device)
    cotangent, features, pairs = (
        torch.randn(s, dtype=torch.float64, device=device).to(dtype) for s in (shape, (n, b), (n, n, b))
    )
    return {ops.minibatch_discrimination: [m, features, cotangent], ops.l1_distance: [m, pairs, cotangent]}


def derivatives(function: Callable[[Tensor], Tensor], m: Tensor, grad: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output, gradient, and the gradient's gradients."""
    m, grad = m.detach().requires_grad_(), grad.detach().requires_grad_()
    output = function(m)
    (grad_m,) = torch.autograd.grad(output, m, grad, create_graph=True)
    second = torch.autograd.grad(grad_m, (grad, m), cotangent, materialize_grads=True)
    return [output.detach(), grad_m.detach(), *second]


def slow(device: torch.device) -> bool:
    """Whether kernels run in Triton's interpreter."""
    return _triton.interprets() and backends.requested() == "triton" and device.type == "cpu"


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_as_accurate_as_stock(gpu: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    if shape in LARGE and slow(gpu):
        pytest.skip("slow in Triton's interpreter")
    tensors = given(shape, dtype, gpu)
    for op, stock in OPS:
        wide = [t.double() for t in tensors[op]]
        sides = derivatives(op, *tensors[op]), derivatives(stock, *tensors[op]), derivatives(stock, *wide)
        for name, values in zip(("output", "grad", "grad_grad", "grad_m"), zip(*sides, strict=True), strict=True):
            assert_as_accurate(*values, f"{op.__name__} {name}")


@pytest.fixture
def cut_into(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets sums over the samples have so many parts."""

    def choose(count: int) -> None:
        for name in ("cuda", "triton", "triton_distance"):
            module = importlib.import_module(f"gankern.ops.minibatch_discrimination.{name}")
            monkeypatch.setattr(module, "cut", lambda n, *_: parts.cut(n, 1, count, 1))

    return choose


def test_features_of_several_tiles(gpu: torch.device, cut_into: Callable[[int], None]) -> None:
    cut_into(1)
    m, grad, _ = given((67, 1, 3), torch.float32, gpu)[ops.minibatch_discrimination]
    got, want = (run(f, [m], grad) for f in OPS[0])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_sums_in_parts(gpu: torch.device, cut_into: Callable[[int], None]) -> None:
    cut_into(3)
    for dims in (4, 18):
        tensors = given((11, 2, dims), torch.float32, gpu)
        for op, stock in OPS:
            got, want = (derivatives(f, *tensors[op]) for f in (op, stock))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
            with_self = partial(op, include_self=True), partial(stock, include_self=True)
            if op is ops.minibatch_discrimination:
                torch.testing.assert_close(*(f(tensors[op][0]) for f in with_self))


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("n", [1, 19])
def test_self_pairs(gpu: torch.device, include_self: bool, n: int) -> None:
    m = batch((n, 2, 5), torch.float32, gpu)
    want = reference.minibatch_discrimination(m, include_self=include_self)
    torch.testing.assert_close(ops.minibatch_discrimination(m, include_self=include_self), want)
    # The pair's own value is lost in 1 + value - 1.
    far = torch.tensor([[[0.0]], [[50.0]]], device=gpu)
    alone = torch.full((2,), float(include_self), device=gpu)
    got = ops.minibatch_discrimination(far, include_self=include_self)[:, 0]
    torch.testing.assert_close(got, alone + torch.tensor(-50.0).exp())


def test_distances_are_symmetric_with_zeros_on_the_diagonal(gpu: torch.device) -> None:
    d = ops.l1_distance(torch.randn(19, 18, 2, device=gpu) * 100)
    assert torch.equal(d, d.transpose(0, 1))
    assert torch.equal(d.diagonal(), torch.zeros(18, 19, device=gpu))


def test_ties_are_torch_abs_ties(gpu: torch.device) -> None:
    m = torch.randint(-1, 2, (12, 2, 3), device=gpu).float()
    tensors = given((12, 2, 3), torch.float32, gpu)
    for op, stock in OPS:
        got, want = (run(f, [m], tensors[op][1]) for f in (op, stock))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("dims", [5, 18])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38, 1e-42])
def test_special_values_are_stocks(gpu: torch.device, value: float, dims: int) -> None:
    tensors = given((6, 2, dims), torch.float32, gpu)
    for op, stock in OPS:
        m, grad, cotangent = tensors[op]
        m[3, 1, 2] = value
        m[4, 1, 2] = 0
        got, want = (derivatives(f, m, grad, cotangent) for f in (op, stock))
        if value == float("inf") and op is ops.minibatch_discrimination:
            # Stock's own pair, left out or not, is inf - inf.
            for theirs in want[1:]:
                theirs[3, 1] = 0
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=2e-5)


def test_every_run_has_the_same_bits(gpu: torch.device) -> None:
    for shape in [(9, 2, 5)] if slow(gpu) else [(70, 3, 5), (150, 1, 20)]:
        tensors = given(shape, torch.float32, gpu)
        for op, _ in OPS:
            first, second = (derivatives(op, *tensors[op]) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 1, 2)], ids=str)
def test_derivatives(gpu: torch.device, shape: tuple[int, int, int]) -> None:
    m = torch.randn(shape, dtype=torch.float64, device=gpu, requires_grad=True)
    for op in (ops.minibatch_discrimination, ops.l1_distance):
        assert torch.autograd.gradcheck(op, m, fast_mode=slow(gpu))
        assert torch.autograd.gradgradcheck(op, m, fast_mode=slow(gpu))


def test_layouts(gpu: torch.device) -> None:
    tensors = given((3, 2, 4), torch.float64, gpu)
    for op, stock in OPS:
        for names in itertools.product(("contiguous", "sliced", "transposed", "expanded"), repeat=3):
            if names.count("contiguous") < 2:
                continue
            views = [layouts(t)[name] for t, name in zip(tensors[op], names, strict=True)]
            torch.testing.assert_close(derivatives(op, *views), derivatives(stock, *views), msg=str(names))
            assert op(views[0]).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (1, 3, 0), (0, 0, 0)], ids=str)
def test_empty(gpu: torch.device, shape: tuple[int, int, int]) -> None:
    tensors = given(shape, torch.float64, gpu)
    for op, stock in OPS:
        torch.testing.assert_close(derivatives(op, *tensors[op]), derivatives(stock, *tensors[op]))


def test_memory_is_linear_in_the_batch(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, cut_into: Callable[[int], None]
) -> None:
    # Parts take memory, too, but no more than fill a GPU.
    cut_into(1)
    n, b, c = 40, 2, 1
    allocated = 0
    empty = torch.empty

    def counted(*args: object, **kwargs: object) -> Tensor:
        nonlocal allocated
        tensor = empty(*args, **kwargs)
        allocated += tensor.numel()
        return tensor

    tensors = given((n, b, c), torch.float32, gpu)[ops.minibatch_discrimination]
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", counted)
        derivatives(ops.minibatch_discrimination, *tensors)
    assert 0 < allocated < n * n * b


def test_parts_cover_all_samples() -> None:
    for n, blocks, least in itertools.product((1, 63, 64, 65, 129, 1000, 4096), (1, 7, 300), (1, 64)):
        count, size = parts.cut(n, blocks, 264, least)
        assert (count - 1) * size < n <= count * size
        assert count == 1 or size >= least
        assert blocks * count <= 2 * 264 or count == 1


def test_third_order(gpu: torch.device) -> None:
    m, v = (torch.randn(3, 2, 2, dtype=torch.float64, device=gpu, requires_grad=True) for _ in range(2))

    def third(op: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        (grad_m,) = torch.autograd.grad(op(m).square().sum(), m, create_graph=True)
        (second,) = torch.autograd.grad(grad_m, m, v, create_graph=True)
        return torch.autograd.grad(second.square().sum(), (m, v))

    for op, stock in OPS:
        torch.testing.assert_close(third(op), third(stock))
