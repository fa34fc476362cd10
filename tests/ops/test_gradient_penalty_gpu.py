"""The gradient penalty by the kernels of the GPU."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from critics import CRITICS, batch, gradients
from oracle import assert_as_accurate, layouts
from torch import Tensor, nn

import gankern
from gankern import _triton, backends, gradient_penalty, penalties
from gankern.ops.gradient_penalty import autograd, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Around a pack, a warp, a block's threads and a chunk.
SHAPES = [(1, 1), (3, 17), (5, 3, 7, 5), (2, 256), (3, 4096), (2, 9001)]
TAILS = [(10.0, 1.0, False, False), (3.0, 3.0, True, False), (0.5, 9.0, True, True), (1.0 / 3, 0.0, False, False)]


def adapter(*tensors: Tensor) -> Any:
    return backends.select("gradient_penalty", *tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_are_as_accurate_as_stock(gpu: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size = math.prod(shape[1:])
    # Norms about the one-sided target; in float16 larger ones overflow.
    real, fake = (torch.randn(shape, device=gpu, dtype=torch.float64).mul(3 / size**0.5).to(dtype) for _ in range(2))
    alpha = torch.rand(shape[0], device=gpu)
    kinds = (dtype, torch.float64)
    stock, exact = (reference.interpolate(real.to(k), fake.to(k), alpha) for k in kinds)
    points = adapter(real).interpolate(real, fake, alpha)
    assert_as_accurate(points, stock, exact, "interpolate")
    for options in TAILS:
        results = (reference.tail(real.to(k), *options) for k in kinds)
        for got, s, e in zip(adapter(real).tail(real, *options), *results, strict=True):
            assert_as_accurate(got, s, e, f"tail {options}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_interpolation_has_the_bits_of_torch(gpu: torch.device, dtype: torch.dtype) -> None:
    real, fake = torch.randn(2, 5, 4099, device=gpu, dtype=dtype)
    alpha = torch.rand(5, device=gpu, dtype=dtype)
    assert torch.equal(autograd.interpolate(real, fake, alpha), reference.interpolate(real, fake, alpha))


def test_layouts(gpu: torch.device) -> None:
    real, fake = torch.randn(2, 3, 4, 5, 2, device=gpu)
    alpha = torch.rand(3, device=gpu)
    names = layouts(real)
    for first, second in itertools.product(names, names):
        a, b = layouts(real)[first], layouts(fake)[second]
        points = adapter(a, b).interpolate(a, b, alpha)
        torch.testing.assert_close(points, reference.interpolate(a, b, alpha))
        assert points.is_contiguous(memory_format=torch.channels_last) == (first == "channels_last")
    for name, grad in layouts(real).items():
        for got, want in zip(adapter(grad).tail(grad, *TAILS[0]), reference.tail(grad, *TAILS[0]), strict=True):
            torch.testing.assert_close(got, want, msg=name)


@pytest.mark.parametrize("options", TAILS, ids=str)
def test_a_zero_gradient_has_the_subgradient_0(gpu: torch.device, options: tuple[Any, ...]) -> None:
    grad = torch.randn(3, 7, device=gpu)
    grad[1] = 0
    loss, cotangent = adapter(grad).tail(grad, *options)
    assert cotangent[1].eq(0).all()
    assert loss.isfinite()
    grad[0, 3] = float("nan")
    loss, cotangent = adapter(grad).tail(grad, *options)
    assert loss.isnan()
    assert cotangent[2].isfinite().all()
    assert options[3] or cotangent[0].isnan().all()


def test_many_samples_and_chunks(gpu: torch.device) -> None:
    """More samples and partial sums than a block adds up at a time."""
    for shape in ((300, 3), (1, 270_000 if _triton.interprets() and backends.requested() == "triton" else 1_060_000)):
        grad = torch.randn(shape, device=gpu, dtype=torch.float64)
        for got, want in zip(adapter(grad).tail(grad, *TAILS[0]), reference.tail(grad, *TAILS[0]), strict=True):
            torch.testing.assert_close(got, want)


# Every layer that gankern has; "unknown layers" are stock's.
NAMES = ["plain", "residual", "tied", "in place", "patch map", "transposed", "group and instance norm, pooling"]
NAMES += ["batch norm", "unknown layers", "smooth, layer norm without weights"]


def both_sides(
    critic: nn.Module, device: torch.device, dtype: torch.dtype, n: int = 3, **options: Any
) -> list[tuple[Tensor, list[Tensor]]]:
    """Loss and gradients by gankern, by stock autograd in the same dtype and by stock in float64."""
    given = [t.to(device) for t in batch(n)]
    sides: list[tuple[Any, torch.dtype]] = [(gradient_penalty, dtype), (reference.gradient_penalty, dtype)]
    found = []
    for penalty, kind in [*sides, (reference.gradient_penalty, torch.float64)]:
        own = copy.deepcopy(critic).to(device, kind)
        real, fake, alpha = (t.to(kind) for t in given)
        loss = penalty(own, real, fake, alpha=alpha, **options)
        found.append((loss.detach(), gradients(own, loss)))
    return found


@pytest.mark.filterwarnings("ignore:the critic has batch norm")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_stocks_for_any_critic(gpu: torch.device, name: str, last: bool) -> None:
    critic = CRITICS[name]().double()
    if last:
        critic = critic.to(memory_format=torch.channels_last)
    (got, ours), _, (want, exact) = both_sides(critic, gpu, torch.float64, weight=7.0, target=0.3)
    torch.testing.assert_close(got, want)
    for g, w in zip(ours, exact, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("plain", torch.bfloat16), ("residual", torch.float32), ("group and instance norm, pooling", torch.float32)],
    ids=str,
)
def test_penalties_are_as_accurate_as_stock(gpu: torch.device, name: str, dtype: torch.dtype) -> None:
    critic = CRITICS[name]().to(dtype)
    (got, ours), (stock, theirs), (want, exact) = both_sides(critic, gpu, dtype, 4)
    assert_as_accurate(got, stock, want, "loss")
    assert_as_accurate(*(torch.cat([g.flatten() for g in side]) for side in (ours, theirs, exact)), "gradients")


@pytest.mark.parametrize("name", ["plain", "patch map"])
def test_fused_critics(gpu: torch.device, name: str) -> None:
    """Convolutions that the bias and the activation are part of."""
    critic = CRITICS[name]().double()
    (want, exact) = both_sides(critic, gpu, torch.float64)[2]
    torch.manual_seed(0)
    critic = CRITICS[name]().double()
    real, fake, alpha = (t.to(gpu) for t in batch(3))
    fused = gankern.fuse(critic.to(gpu))
    loss = gradient_penalty(fused, real, fake, alpha=alpha)
    torch.testing.assert_close(loss.detach(), want)
    for g, w in zip(gradients(fused, loss), exact, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def test_the_family_and_third_order(gpu: torch.device) -> None:
    critic = CRITICS["residual"]().double().to(gpu)
    real, fake, alpha = (t.to(gpu) for t in batch(2))
    at = reference.penalty_at
    between = alpha * real + (1 - alpha) * fake
    cases = [
        (penalties.r1(critic, real, weight=3.0), at(critic, real, weight=1.5, squared=True)),
        (
            gradient_penalty(critic, real, fake, alpha=alpha, one_sided=True, target=0.001),
            at(critic, between, weight=10.0, one_sided=True, target=0.001),
        ),
        (
            gradient_penalty(critic, real, fake, alpha=alpha, create_graph=True),
            at(critic, between, weight=10.0, target=1.0),
        ),
    ]
    for got, want in cases:
        torch.testing.assert_close(got, want)
        for g, w in zip(gradients(critic, got), gradients(critic, want), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def events(step: Any) -> dict[str, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return {e.key: e.count for e in profile.key_averages()}


@pytest.mark.parametrize("fused", [False, True])
def test_four_passes_a_layer_no_zeros_and_no_waiting_for_the_device(gpu: torch.device, fused: bool) -> None:
    critic = CRITICS["plain"]().to(gpu)
    critic = gankern.fuse(critic) if fused else critic
    real, fake, _ = (t.to(gpu) for t in batch(dtype=torch.float32))
    losses = []
    found = events(lambda: losses.append(gradient_penalty(critic, real, fake)))
    # Three layers: forward and tangent (not of the last: its output's gradient is constant); input and weight gradient.
    assert found["aten::convolution"] == 3 + 2
    assert found["aten::convolution_backward"] == 3 + 3
    # The gradients of two biases, on which the penalty does not depend; stock has none for the third.
    assert found["aten::zeros_like"] == 2
    assert found["aten::rand"] == 1
    assert "aten::_local_scalar_dense" not in found
    backward = events(losses[0].backward)
    assert not [name for name in backward if "convolution" in name or name == "aten::_local_scalar_dense"]


def test_where_kernels_refuse_torch_runs_the_layers(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without CuPy and Triton: the layers, four passes and no zeros stay."""
    critic = CRITICS["plain"]().to(gpu)
    real, fake, _ = (t.to(gpu) for t in batch(dtype=torch.float32))
    with gankern.backend("reference"):
        found = events(lambda: gradient_penalty(critic, real, fake))
    assert (found["aten::convolution"], found["aten::convolution_backward"]) == (5, 6)
    assert found["aten::zeros_like"] == 2
    critic = CRITICS["group and instance norm, pooling"]().double()
    with gankern.backend("reference"):
        (_, ours), _, (_, exact) = both_sides(critic, gpu, torch.float64)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


def test_activations_keep_the_layout_of_stock(gpu: torch.device) -> None:
    """Images are not turned for a GPU, and what other functions get is not copied."""
    first, second = nn.Conv2d(3, 4, 3, padding=1).to(gpu), nn.Conv2d(4, 1, 8).to(gpu)
    first = first.to(memory_format=torch.channels_last)
    seen: list[tuple[int, ...]] = []

    def critic(x: Tensor) -> Tensor:
        h = first(x).sinh()
        seen.append(h.stride())
        return second(h).flatten()

    real, fake, _ = (t.to(gpu) for t in batch(dtype=torch.float32))
    params = [*first.parameters(), *second.parameters()]
    for create_graph in (False, True):
        gradient_penalty(critic, real, fake, params=params, create_graph=create_graph)
    critic(real)
    assert seen[0] == seen[1] == seen[2]


def test_gradients_follow_the_factor_of_the_loss(gpu: torch.device) -> None:
    critic = CRITICS["plain"]().to(gpu)
    real, fake, alpha = (t.to(gpu) for t in batch(dtype=torch.float32))
    params = list(critic.parameters())[:-1]
    once, thrice = (torch.autograd.grad(f * gradient_penalty(critic, real, fake, alpha=alpha), params) for f in (1, 3))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(b, 3 * a)


def test_same_bits_on_every_run(gpu: torch.device) -> None:
    critic = CRITICS["residual"]().to(gpu)
    real, fake, alpha = (t.to(gpu) for t in batch(dtype=torch.float32))
    first, second = (gradients(critic, gradient_penalty(critic, real, fake, alpha=alpha)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_captured_step_draws_alpha_again(gpu: torch.device) -> None:
    """On a GPU only: the whole penalty in a CUDA graph, with nothing that waits for the device."""
    if gpu.type != "cuda":
        pytest.skip("needs a GPU")
    critic = CRITICS["residual"]().to(gpu)
    real, fake, _ = (t.to(gpu) for t in batch(dtype=torch.float32))

    def step() -> Tensor:
        critic.zero_grad(set_to_none=False)
        loss = gradient_penalty(critic, real, fake)
        loss.backward()
        return loss.detach()

    with warnings.catch_warnings():
        # torch calls it a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    losses = set()
    for _ in range(3):
        graph.replay()
        losses.add(loss.item())
    assert len(losses) == 3
