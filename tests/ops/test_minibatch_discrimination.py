from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_as_accurate, layouts, run
from torch import Tensor
from torch.library import opcheck

import gankern
from gankern import ops
from gankern.ops.minibatch_discrimination import reference

# Samples, features, kernel dims: lone samples, partial vectors, features narrower and wider than a vector, long batches
# that are cut into parts, many kernel dims.
SHAPES = [
    (1, 1, 1),
    (1, 20, 3),
    (2, 3, 1),
    (5, 1, 7),
    (15, 17, 4),
    (16, 16, 16),
    (33, 7, 2),
    (65, 3, 5),
    (40, 5, 130),
    (260, 2, 17),
    (140, 17, 12),
]


def batch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Samples near enough for exponentials that are not all zero, one in five equal to another."""
    m = torch.randn(shape, dtype=torch.float64) / shape[2]
    m[5::5] = m[0]
    return m.to(dtype)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def cdist_features(m: Tensor, include_self: bool) -> Tensor:
    t = m.transpose(0, 1)
    return torch.exp(-torch.cdist(t, t, p=1)).sum(2).t() - (0 if include_self else 1)


def double_backward(function: Callable[[Tensor], Tensor], m: Tensor, grad: Tensor, cotangent: Tensor) -> list[Tensor]:
    m, grad = m.detach().requires_grad_(), grad.detach().requires_grad_()
    (grad_m,) = torch.autograd.grad(function(m), m, grad, create_graph=True)
    return [grad_m.detach(), *torch.autograd.grad(grad_m, (grad, m), cotangent, materialize_grads=True)]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_stock(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, b, _ = shape
    m, cotangent = batch(shape, dtype), random(*shape, dtype=dtype)
    for ours, stock, grad in [
        (ops.minibatch_discrimination, reference.minibatch_discrimination, random(n, b, dtype=dtype)),
        (ops.l1_distance, reference.l1_distance, random(n, n, b, dtype=dtype)),
    ]:
        wide = [t.double() for t in (m, grad, cotangent)]
        sides = [(ours, m, grad, cotangent), (stock, m, grad, cotangent), (stock, *wide)]
        for name, results in {
            "first order": [run(f, [x], g) for f, x, g, _ in sides],
            "second order": [double_backward(*side) for side in sides],
        }.items():
            for values in zip(*results, strict=True):
                assert_as_accurate(*values, what=f"{ours.__name__} {name}")


@pytest.mark.kernel
def test_long_batches_are_as_accurate_as_cdist() -> None:
    m, grad = batch((3000, 1, 4), torch.float32), random(3000, 1, dtype=torch.float32)
    sides = [(ops.minibatch_discrimination, m), (lambda m: cdist_features(m, False), m)]
    exact = run(lambda m: cdist_features(m, False), [m.double()], grad.double())
    ours, stock = (run(f, [x], grad) for f, x in sides)
    for name, values in zip(("output", "grad_m"), zip(ours, stock, exact, strict=True), strict=True):
        assert_as_accurate(*values, what=name)


@pytest.mark.kernel
@pytest.mark.parametrize("include_self", [False, True])
def test_self_pairs(include_self: bool) -> None:
    m = batch((19, 3, 4), torch.float64)
    torch.testing.assert_close(
        ops.minibatch_discrimination(m, include_self=include_self), cdist_features(m, include_self)
    )
    lone = ops.minibatch_discrimination(m[:1], include_self=include_self)
    assert torch.equal(lone, torch.full((1, 3), float(include_self), dtype=torch.float64))
    # The pair's own value is lost in 1 + value - 1.
    far = torch.tensor([[[0.0]], [[50.0]]])
    torch.testing.assert_close(ops.minibatch_discrimination(far)[:, 0], torch.tensor([-50.0, -50.0]).exp())


def check_distances_are_symmetric(*shape: int) -> None:
    for m in (torch.randn(shape), torch.randn(shape[2], *shape[:2]).permute(1, 2, 0)):
        d = ops.l1_distance(m * 100)
        assert torch.equal(d, d.transpose(0, 1))
        assert torch.equal(d.diagonal(), torch.zeros(shape[1], shape[0]))


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(35, 3, 5), (33, 40, 2)])
def test_distances_are_symmetric_with_zeros_on_the_diagonal(shape: tuple[int, ...]) -> None:
    check_distances_are_symmetric(*shape)


@pytest.mark.by_size
@pytest.mark.parametrize("shape", [(7, 9, 37), (5, 7, 19), (3, 100, 16)])
def test_distances_of_few_samples_are_symmetric_too(shape: tuple[int, ...]) -> None:
    check_distances_are_symmetric(*shape)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_are_torch_abs_ties(dtype: torch.dtype) -> None:
    m = torch.randint(-1, 2, (40, 3, 4)).to(dtype)
    features, distances = random(40, 3, dtype=dtype), random(40, 40, 3, dtype=dtype)
    for ours, stock, grad in [
        (ops.minibatch_discrimination, reference.minibatch_discrimination, features),
        (ops.l1_distance, reference.l1_distance, distances),
    ]:
        for got, want in zip(run(ours, [m], grad), run(stock, [m], grad), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_special_values_are_stocks(value: float) -> None:
    m, grad = batch((20, 3, 4), torch.float32), random(20, 3, dtype=torch.float32)
    m[7, 1, 2] = value
    got, want = (run(f, [m], grad) for f in (ops.minibatch_discrimination, reference.minibatch_discrimination))
    if value == float("inf"):
        # Stock's own pair, left out or not, is inf - inf.
        want[1][7, 1] = 0
    for ours, stock in zip(got, want, strict=True):
        torch.testing.assert_close(ours, stock, equal_nan=True, rtol=1e-5, atol=1e-6)
    distances = ops.l1_distance(m), reference.l1_distance(m)
    torch.testing.assert_close(*distances, equal_nan=True)


@pytest.mark.kernel
def test_results_do_not_depend_on_run_or_threads() -> None:
    def everything() -> list[Tensor]:
        found = []
        for shape in [(70, 37, 5), (300, 3, 12)]:
            torch.manual_seed(1)
            m, cotangent = batch(shape, torch.float32), torch.randn(shape)
            for op, grad in [(ops.minibatch_discrimination, shape[:2]), (ops.l1_distance, (shape[0], *shape[:2]))]:
                found += [op(m), *double_backward(op, m, torch.randn(grad), cotangent)]
        return found

    before, runs = torch.get_num_threads(), []
    for count in (1, 2, 2, 5):
        torch.set_num_threads(count)
        runs.append(everything())
    torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("shape", [(1, 2, 3), (5, 2, 3), (18, 1, 1)], ids=str)
def test_derivatives(shape: tuple[int, int, int]) -> None:
    m = random(*shape).requires_grad_()
    for op in (ops.minibatch_discrimination, ops.l1_distance):
        assert torch.autograd.gradcheck(op, m)
        assert torch.autograd.gradgradcheck(op, m)


def test_third_order() -> None:
    def penalty(op: Callable[[Tensor], Tensor], m: Tensor, w: Tensor) -> Tensor:
        (g,) = torch.autograd.grad((op(m * w).square()).sum(), m, create_graph=True)
        return (g.flatten(1).norm(dim=1) - 1).square().mean()

    m, w = random(4, 2, 3).requires_grad_(), random(2, 3).requires_grad_()
    for ours, stock in [
        (ops.minibatch_discrimination, reference.minibatch_discrimination),
        (ops.l1_distance, reference.l1_distance),
    ]:
        assert torch.autograd.gradcheck(lambda m, w: penalty(ours, m, w), (m, w))  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda m, w: penalty(ours, m, w), (m, w))  # noqa: B023
        torch.testing.assert_close(penalty(ours, m, w), penalty(stock, m, w))


def test_second_derivative_of_distances_is_none() -> None:
    m, grad = random(4, 2, 3).requires_grad_(), random(4, 4, 2).requires_grad_()
    (grad_m,) = torch.autograd.grad(ops.l1_distance(m), m, grad, create_graph=True)
    by_grad, by_m = torch.autograd.grad(grad_m.sum(), (grad, m), allow_unused=True)
    assert by_grad is not None
    assert by_m is None


def test_one_tensor_in_two_places() -> None:
    """The input as its own cotangent: the third-order gradient has a share from each place."""

    def twice(op: Callable[[Tensor], Tensor], m: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(op(m).sum(), m, create_graph=True)
        (gg,) = torch.autograd.grad(g, m, m, create_graph=True)
        return gg

    m = random(4, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: twice(ops.minibatch_discrimination, m), m)


def test_layouts() -> None:
    m, grad, cotangent = random(6, 5, 4), random(6, 5), random(6, 5, 4)
    for op, stock in [(ops.minibatch_discrimination, reference.minibatch_discrimination)]:
        for (a, x), (b, g), (c, v) in itertools.product(
            layouts(m).items(), layouts(grad).items(), layouts(cotangent).items()
        ):
            for got, want in zip(double_backward(op, x, g, v), double_backward(stock, x, g, v), strict=True):
                torch.testing.assert_close(got, want, msg=f"{a} {b} {c}")
            assert op(x).is_contiguous()
    grad = random(6, 6, 5)
    for x, g, v in itertools.product(*(layouts(t).values() for t in (m, grad, cotangent))):
        torch.testing.assert_close(
            double_backward(ops.l1_distance, x, g, v), double_backward(reference.l1_distance, x, g, v)
        )


def test_expanded_gradient_of_a_sum() -> None:
    for op, stock in [
        (ops.minibatch_discrimination, reference.minibatch_discrimination),
        (ops.l1_distance, reference.l1_distance),
    ]:
        m = random(7, 3, 4).requires_grad_()
        (want,) = torch.autograd.grad(stock(m).sum(), m)
        op(m).sum().backward()
        torch.testing.assert_close(m.grad, want)


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (1, 3, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, b, _ = shape
    m, cotangent = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    for op, stock, grad in [
        (ops.minibatch_discrimination, reference.minibatch_discrimination, random(n, b, dtype=dtype)),
        (ops.l1_distance, reference.l1_distance, random(n, n, b, dtype=dtype)),
    ]:
        torch.testing.assert_close(run(op, [m], grad), run(stock, [m], grad))
        torch.testing.assert_close(double_backward(op, m, grad, cotangent), double_backward(stock, m, grad, cotangent))


@pytest.mark.kernel
@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(0, 50),
    b=st.integers(0, 35),
    c=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    layout=st.sampled_from(["contiguous", "sliced", "transposed", "expanded"]),
    ties=st.booleans(),
)
def test_any_shape(n: int, b: int, c: int, dtype: torch.dtype, layout: str, ties: bool) -> None:
    m = random(n, b, c) / max(c, 1)
    m = layouts((m * 8).round() / 8 if ties else m)[layout].to(dtype)
    cotangent = random(n, b, c, dtype=dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for op, stock, grad in [
        (ops.minibatch_discrimination, reference.minibatch_discrimination, random(n, b, dtype=dtype)),
        (ops.l1_distance, reference.l1_distance, random(n, n, b, dtype=dtype)),
    ]:
        torch.testing.assert_close(op(m), stock(m), **tolerance)
        got, want = (double_backward(f, m, grad, cotangent) for f in (op, stock))
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("shape", [(64, 40, 1), (2048, 2, 3)], ids=str)
def test_memory_is_linear_in_the_batch(shape: tuple[int, int, int]) -> None:
    n, b, _ = shape
    m, grad, cotangent = (torch.zeros(s) for s in (shape, shape[:2], shape))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        double_backward(ops.minibatch_discrimination, m, grad, cotangent)
    allocated = sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.nbytes() > 0)  # type: ignore[union-attr]
    assert 0 < allocated < 4 * n * n * b


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_reference_backend(dtype: torch.dtype) -> None:
    m, grad, cotangent = batch((6, 3, 4), dtype), random(6, 3, dtype=dtype), random(6, 3, 4, dtype=dtype)
    with gankern.backend("reference"):
        got = double_backward(ops.minibatch_discrimination, m, grad, cotangent)
        distances = double_backward(ops.l1_distance, m, random(6, 6, 3, dtype=dtype), cotangent)
    assert all(t.dtype == dtype for t in [*got, *distances])
    want = double_backward(ops.minibatch_discrimination, *(t.double() for t in (m, grad, cotangent)))
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 3e-2
    torch.testing.assert_close([t.double() for t in got], want, rtol=tolerance, atol=tolerance)


OPERATORS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "features": (torch.ops.gankern.minibatch_discrimination.default, lambda: (random(5, 3, 4), True)),
    "features_backward": (
        torch.ops.gankern.minibatch_discrimination_backward.default,
        lambda: (random(5, 3), random(5, 3, 4)),
    ),
    "features_double_backward": (
        torch.ops.gankern.minibatch_discrimination_double_backward.default,
        lambda: (random(5, 3, 4), random(5, 3), random(5, 3, 4)),
    ),
    "distance": (torch.ops.gankern.l1_distance.default, lambda: (random(5, 3, 4),)),
    "distance_backward": (torch.ops.gankern.l1_distance_backward.default, lambda: (random(5, 5, 3), random(5, 3, 4))),
    "distance_tangent": (torch.ops.gankern.l1_distance_tangent.default, lambda: (random(5, 3, 4), random(5, 3, 4))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    op, args = OPERATORS[name]
    opcheck(op, args())
    opcheck(op, tuple(layouts(a)["transposed"] if isinstance(a, Tensor) else a for a in args()))


def test_compile() -> None:
    def loss(m: Tensor, w: Tensor) -> Tensor:
        m = m * w
        return (ops.minibatch_discrimination(m, include_self=True) * 2).sum() + ops.l1_distance(m).square().sum()

    m, w = random(5, 3, 4).requires_grad_(), random(3, 4).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True)
    got, want = compiled(m, w), loss(m, w)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (m, w)), torch.autograd.grad(want, (m, w)))


@pytest.mark.parametrize("op", [ops.minibatch_discrimination, ops.l1_distance])
@pytest.mark.parametrize(
    ("m", "error", "message"),
    [
        ([[1.0]], TypeError, "m must be a Tensor; got list"),
        (torch.zeros(2, 3, 4).to_sparse(), TypeError, "m must be a dense tensor; got layout torch.sparse_coo"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), TypeError, "m must have a floating-point dtype; got torch.int64"),
        (torch.zeros(2, 3), ValueError, r"m must have shape \(N, B, C\); got \(2, 3\)"),
    ],
)
def test_bad_m(op: Callable[..., Tensor], m: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        op(m)


def test_bad_include_self() -> None:
    with pytest.raises(TypeError, match="include_self must be a bool; got 1"):
        ops.minibatch_discrimination(torch.zeros(2, 3, 4), include_self=1)  # type: ignore[arg-type]


@pytest.mark.by_size
@pytest.mark.parametrize("name", ["l1_distance", "minibatch_discrimination"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_few_samples_go_to_plain_torch(name: str, dtype: torch.dtype) -> None:
    op, oracle = getattr(ops, name), getattr(reference, name)
    options: list[dict[str, bool]] = [{}] if name == "l1_distance" else [{}, {"include_self": True}]

    def kernels_run(m: Tensor) -> bool:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            op(m)
        return any(e.key.startswith("gankern::") for e in profile.key_averages())

    few, many = (torch.randn(n, 100, 16, dtype=dtype, requires_grad=True) for n in (3, 20))
    assert kernels_run(many) and not kernels_run(few)
    with gankern.backend("cpu"):
        assert kernels_run(few)
    few.data[1, :50] = few.data[0, :50]  # ties
    for option in options:
        got, want = op(few, **option), oracle(few.double(), **option)
        assert_as_accurate(got, oracle(few, **option), want, "output")
        grad = torch.randn_like(got)
        grads = [torch.autograd.grad(o, few, g, create_graph=True)[0] for o, g in ((got, grad), (want, grad.double()))]
        torch.testing.assert_close(grads[0], grads[1].to(dtype))
        first = torch.autograd.grad(op(few, **option), few, grad)[0]
        torch.testing.assert_close(first, grads[1].to(dtype))
    if name == "minibatch_discrimination":
        torch.testing.assert_close(*(torch.autograd.grad(g.square().sum(), few)[0] for g in grads))
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(few), oracle(few))
