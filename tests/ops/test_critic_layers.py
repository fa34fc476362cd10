"""Group norm, instance norm and average pooling in the critic layers' machinery."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from critics import batch, both, gradients
from oracle import assert_as_accurate
from torch import Tensor, nn

import gankern
from gankern import gradient_penalty
from gankern.ops.critic_layers import CriticLayers, Scope
from gankern.ops.gradient_penalty import penalty_points
from gankern.ops.gradient_penalty import reference as stock_penalty


def taken(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, dict[str, int]]:
    with CriticLayers(Scope()) as layers:
        output = function(*inputs)
    return output, dict(layers.taken)


def layered(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: taken(function, *inputs)[0]


NORMS: dict[str, tuple[tuple[int, ...], Callable[..., Tensor]]] = {
    "group norm": ((2, 6, 2, 3), lambda x, w, b: F.group_norm(x, 3, w, b)),
    "channels last": (
        (2, 4, 2, 3),
        lambda x, w, b: F.group_norm(x.contiguous(memory_format=torch.channels_last), 2, w, b),
    ),
    "one group, torch": ((2, 4, 5), lambda x, w, b: torch.group_norm(x, 1, w, b, 1e-3)),
    "vectors": ((3, 4), lambda x, w, b: F.group_norm(x, 2, w, b, eps=0.1)),
    "one sample": ((1, 4, 3), lambda x, w, b: F.group_norm(x, 2, w, b)),
    "instance norm": ((2, 3, 2, 2), lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=1e-2)),
    "instance norm, volume": ((1, 2, 2, 1, 2), lambda x, w, b: F.instance_norm(x, None, None, w, b, eps=1e-2)),
}


@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_have_exact_derivatives(name: str, affine: str) -> None:
    shape, norm = NORMS[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64).unbind()
    params = {"both": [weight, bias], "weight": [weight], "none": []}[affine]
    params = [p.clone().requires_grad_() for p in params]

    def function(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return norm(x, w, b).sin()

    _, counts = taken(function, x, *params)
    assert counts == {"instance_norm" if "instance" in name else "group_norm": 1}
    torch.testing.assert_close(layered(function)(x, *params), function(x, *params))
    assert torch.autograd.gradcheck(layered(function), [x, *params])
    assert torch.autograd.gradgradcheck(layered(function), [x, *params])


POOLS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "1d": ((2, 3, 7), lambda x: F.avg_pool1d(x, 2)),
    "1d, padded": ((2, 3, 7), lambda x: F.avg_pool1d(x, 3, 2, 1)),
    "2d": ((2, 3, 4, 6), lambda x: F.avg_pool2d(x, 2)),
    "2d, remainder": ((2, 3, 5, 7), lambda x: F.avg_pool2d(x, (2, 3))),
    "2d, one sample, wide": ((1, 1, 3, 40), lambda x: F.avg_pool2d(x, 3, ceil_mode=True)),
    "2d, overlapping": ((2, 2, 5, 5), lambda x: F.avg_pool2d(x, 3, 1, padding=(1, 1), count_include_pad=False)),
    "2d, ceil": ((2, 2, 5, 5), lambda x: F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=3)),
    "2d, ceil remainder": ((2, 2, 5, 5), lambda x: F.avg_pool2d(x, [2], None, 0, True)),
    "3d": ((2, 2, 4, 4, 2), lambda x: F.avg_pool3d(x, 2)),
    "adaptive 1d": ((2, 3, 6), lambda x: F.adaptive_avg_pool1d(x, 2)),
    "adaptive 2d": ((2, 3, 4, 6), lambda x: F.adaptive_avg_pool2d(x, 1)),
    "adaptive 2d, uneven": ((2, 3, 5, 6), lambda x: F.adaptive_avg_pool2d(x, (2, None))),
    "adaptive 3d": ((2, 3, 2, 2, 4), lambda x: F.adaptive_avg_pool3d(x, (1, 2, 2))),
    "adaptive 3d, uneven": ((2, 2, 3, 3, 2), lambda x: F.adaptive_avg_pool3d(x, 2)),
}


@pytest.mark.parametrize(
    ("name", "last"),
    [(name, last) for name, (shape, _) in POOLS.items() for last in ([False] if len(shape) == 3 else [False, True])],
)
def test_pools_have_exact_derivatives(name: str, last: bool, threads: int) -> None:
    shape, pool = POOLS[name]
    x = torch.randn(shape, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    x.requires_grad_()
    output, counts = taken(pool, x)
    assert sum(counts.values()) == 1
    want = pool(x)
    torch.testing.assert_close(output, want)
    assert output.stride() == want.stride()
    grad = torch.randn_like(want)
    got, want = (torch.autograd.grad(y, x, grad)[0] for y in (output, want))
    torch.testing.assert_close(got, want)
    assert x.dim() == 5 or got.stride() == x.stride()  # in three dimensions aten's backward is contiguous
    assert torch.autograd.gradcheck(layered(pool), [x])
    assert torch.autograd.gradgradcheck(layered(lambda x: pool(x).sin()), [x])


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 6, 37), (5, 4, 300), (3, 38, 3)], ids=str)
@pytest.mark.parametrize("groups", ["one", "half", "each"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_group_norm_kernels(shape: tuple[int, ...], groups: str, last: bool, threads: int) -> None:
    from gankern.ops.critic_layers import cpu, reference

    n, channels, inner = shape
    count = {"one": 1, "half": max(channels // 2, 1), "each": channels}[groups]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, grad, tangent = (torch.randn(n, channels, inner, dtype=torch.float64).to(dtype) for _ in range(3))
        x = x + 3
        if last:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        for weight, bias in [(None, None), torch.randn(2, channels).to(dtype).unbind()]:

            def results(module: Any, kind: torch.dtype, given=(x, grad, tangent, weight, bias)) -> list[Tensor]:
                x, grad, tangent, weight, bias = (None if t is None else t.to(kind) for t in given)
                y, mean, rstd = module.group_norm_forward(x, weight, bias, count, 1e-2)
                first = module.group_norm_backward(grad, x, weight, mean, rstd, True)
                second = module.group_norm_double_backward(tangent, grad, x, weight, mean, rstd, True)
                return [y, *first, *second]

            # The plain formulas in float32 stand for stock in bfloat16, which has none of its own at this precision.
            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            got, stock, exact = results(cpu, dtype), results(reference, wide), results(reference, torch.float64)
            names = ("output", "grad_input", "grad_weight", "grad_bias", "d2_grad_output", "d2_input", "d2_weight")
            for name, g, s, e in zip(names, got, stock, exact, strict=True):
                floor = e.norm() * 2e-6 + 1e-5 * inner**0.5 if dtype == torch.float32 else 0
                if (g.double() - e).norm() > floor:
                    assert_as_accurate(g, s.to(dtype), e, f"{name} {dtype}")


@pytest.mark.kernel
@pytest.mark.parametrize("kernel", [(2, 2), (1, 3), (3, 1), (4, 16)], ids=str)
def test_avg_pool_kernels(kernel: tuple[int, int], threads: int) -> None:
    from gankern.ops.critic_layers import cpu, reference

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(2, 3, 9, 37, dtype=torch.float64).to(dtype)
        size = list(kernel)
        grad = torch.randn_like(reference.avg_pool2d(x, size))
        pairs = [
            [m.avg_pool2d(x.to(t), size), m.avg_pool2d_backward(grad.to(t), x.shape, size)]
            for m, t in ((cpu, dtype), (reference, dtype), (reference, torch.float64))
        ]
        for name, got, stock, exact in zip(("forward", "backward"), *pairs, strict=True):
            assert_as_accurate(got, stock, exact, f"{name} {dtype}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["group norm", "instance norm", "channels last"])
def test_instance_and_group_norm_accuracy(name: str, dtype: torch.dtype) -> None:
    _, norm = NORMS[name]
    x, (weight, bias) = torch.randn(3, 6, 9, 7) * 2 + 1, torch.randn(2, 6)
    inputs = [t.to(dtype) for t in (x, weight, bias)]
    grad, tangent = torch.randn(2, *x.shape).to(dtype)

    def derivatives(ours: bool, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind, copy=True).requires_grad_() for t in inputs]
        first = grad.to(kind, copy=True).requires_grad_()
        scope = Scope()
        with CriticLayers(scope) if ours else nullcontext():
            output = norm(*leaves)
        params = torch.autograd.grad(output, leaves, first, retain_graph=True)
        with scope.input_gradient():
            (inner,) = torch.autograd.grad(output, leaves[0], first, create_graph=True)
        return [output.detach(), *params, *torch.autograd.grad(inner, [first, *leaves[:2]], tangent.to(kind))]

    got, stock = derivatives(True, dtype), derivatives(False, dtype)
    for i, (g, s, e) in enumerate(zip(got, stock, derivatives(False, torch.float64), strict=True)):
        assert_as_accurate(g, s, e, f"result {i}")


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
def test_instance_norm_moves_running_statistics_as_stock(momentum: float) -> None:
    ours = nn.InstanceNorm2d(3, affine=True, track_running_stats=True, momentum=momentum).double()
    stock = copy.deepcopy(ours)
    for _ in range(2):
        x = torch.randn(4, 3, 2, 3, dtype=torch.float64) + 2
        torch.testing.assert_close(taken(ours, x)[0], stock(x))
        torch.testing.assert_close(dict(ours.named_buffers()), dict(stock.named_buffers()))
    ours.eval(), stock.eval()
    output, counts = taken(ours, x)
    assert not counts
    torch.testing.assert_close(output, stock(x))


def test_left_to_stock() -> None:
    x = torch.randn(2, 4, 4, 4)
    half = torch.ones(4, dtype=torch.bfloat16)
    cases: list[Callable[[], Tensor]] = [
        lambda: F.avg_pool2d(x[0], 2),
        lambda: F.adaptive_avg_pool2d(x[0], 2),
        lambda: F.instance_norm(x, torch.zeros(4), torch.ones(4), use_input_stats=False),
        lambda: F.group_norm(x.bfloat16(), 2, half.float(), half.float()),
    ]
    for case in cases:
        output, counts = taken(case)
        assert not counts
        torch.testing.assert_close(output, case())
    with pytest.raises(RuntimeError, match="divisible"):
        taken(lambda: F.group_norm(x, 3))
    with pytest.raises(ValueError, match="more than 1"):
        taken(lambda: F.instance_norm(x[:, :, :1, :1]))
    with torch.autocast("cpu"):
        assert not taken(lambda: F.group_norm(x, 2))[1]


def test_channels_last_is_kept() -> None:
    x = torch.randn(2, 4, 4, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    for function in (lambda x: F.group_norm(x, 2), F.instance_norm, lambda x: F.avg_pool2d(x, 2)):
        output, _ = taken(function, x)
        assert output.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output, function(x))
        (grad,) = torch.autograd.grad(output.sin().sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(function(x).sin().sum(), x)[0])


def test_pooling_keeps_no_values_of_its_input() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output, _ = taken(lambda x: F.avg_pool2d(x, 2), x)
        (grad,) = torch.autograd.grad(output, x, torch.ones_like(output, requires_grad=True), create_graph=True)
    assert grad.requires_grad
    assert not kept


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_no_zero_tensor_is_driven_through(last: bool) -> None:
    def count(*middle: nn.Module) -> Counter[str]:
        critic = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), *middle, nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 4))
        real, fake, alpha = batch(dtype=torch.float32)
        if last:
            critic = critic.to(memory_format=torch.channels_last)
            real, fake = (t.contiguous(memory_format=torch.channels_last) for t in (real, fake))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            gradient_penalty(critic, real, fake, alpha=alpha)
        names = {
            "aten::convolution": "conv",
            "gankern::conv": "conv",
            "gankern::conv_input_grad": "input gradient",
            "gankern::conv_weight_grad": "weight gradient",
            "aten::zeros_like": "zeros",
            "aten::zeros": "zeros",
        }
        found: Counter[str] = Counter()
        for event in profile.key_averages():
            if event.key in names:
                found[names[event.key]] += event.count
        return found

    plain = count()
    assert count(nn.AvgPool2d(2)) == count(nn.AdaptiveAvgPool2d(4)) == plain
    normed = count(nn.GroupNorm(2, 4))
    # The norm's second derivative reaches its input, so that one more gradient passes through the convolution before.
    assert normed.pop("weight gradient") == plain.pop("weight gradient") + 1
    # Zeros are the gradients of the biases on which the penalty does not depend: of those of the convolution in front
    # of the norm it does.
    assert normed == plain


def test_float32_penalty_is_as_accurate_as_stock() -> None:
    exact = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1),
        nn.GroupNorm(4, 8),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.InstanceNorm2d(8, affine=True),
        nn.Softplus(),
        nn.Conv2d(8, 1, 3),
        nn.AdaptiveAvgPool2d(1),
    ).double()
    real, fake, alpha = batch(8)
    results = []
    for function, dtype in [
        (gradient_penalty, torch.float32),
        (stock_penalty.gradient_penalty, torch.float32),
        (stock_penalty.gradient_penalty, torch.float64),
    ]:
        critic = copy.deepcopy(exact).to(dtype)
        loss = function(critic, real.to(dtype), fake.to(dtype), alpha=alpha.to(dtype))
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in critic.parameters()]
        results.append((loss.detach(), torch.cat([g.flatten() for g in grads])))
    for ours, stock, best in zip(*results, strict=True):
        assert_as_accurate(ours, stock, best)


def test_the_forward_pass_keeps_the_bits_of_stock() -> None:
    """A pre-activation that rounds to the other sign would move a float32 gradient by as much as 1e-4 of its norm."""
    critic = nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AvgPool2d(3)
    )
    x = torch.randn(4, 3, 32, 32)
    stock = critic(x)
    with CriticLayers(Scope()) as layers:
        assert torch.equal(critic(x.clone().requires_grad_()), stock)
    assert layers.taken == {"conv2d": 2, "leaky_relu": 1, "relu": 1, "avg_pool2d": 2}
    real, fake, alpha = torch.randn_like(x), torch.randn_like(x), torch.rand(4, 1, 1, 1)
    points = penalty_points(real, fake, alpha, None)
    assert torch.equal(points, alpha * real + (1 - alpha) * fake)


def test_overwritten_weights_are_noticed() -> None:
    first = nn.Conv2d(3, 8, 3)
    critic = nn.Sequential(first, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8 * 6 * 6, 1))
    real, fake, alpha = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.rand(2)
    loss = gradient_penalty(critic, real, fake, alpha=alpha, create_graph=True)
    with torch.no_grad():
        first.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gray_images_have_the_kernel_of_few_channels() -> None:
    critic = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 1))
    real, fake = torch.randn(2, 4, 1, 8, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradient_penalty(critic, real, fake)
    assert sum(e.count for e in profile.key_averages() if e.key == "gankern::conv_input_grad") == 1


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: F.conv2d(x, torch.randn(8, 4, 3, 3)),
        lambda x: F.conv2d(x, torch.randn(8, 3, 30, 30)),
        lambda x: F.conv2d(x, torch.randn(8, 3, 3, 3), torch.randn(5)),
        lambda x: F.conv2d(x, torch.randn(8, 3, 3, 3), torch.randn(8).double()),
        lambda x: F.conv2d(x, torch.randn(8, 3, 3, 3), stride=0),
        lambda x: F.conv2d(x, torch.randn(8, 3, 3, 3), padding=-1),
    ],
)
def test_what_stock_refuses_is_refused(bad: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with CriticLayers(Scope()), pytest.raises(RuntimeError):
        bad(x)


class Branches(nn.Module):
    """Activations that are used twice, in place and not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.norm, self.head = nn.LayerNorm([8, 8, 8]), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.second(F.leaky_relu(self.norm(h), 0.2, True)) + h
        y = F.relu(y + F.relu(h)) + 2 * y
        y = F.avg_pool2d(y, 2) + F.avg_pool2d(h, 2)
        z = F.relu(y)
        y.mul_(3)
        return self.head((F.relu(y.clone(), inplace=True) + y + z).mean((2, 3)))


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_what_is_used_twice(create_graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from gankern.ops.critic_layers import fork

    def found(size: int) -> tuple[Tensor, list[Tensor]]:
        monkeypatch.setattr(fork, "_LARGE", size)
        loss = gradient_penalty(critic, real, fake, alpha=alpha, create_graph=create_graph)
        return loss, torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True, create_graph=create_graph)

    critic = Branches().double()
    (real, fake), alpha = torch.randn(2, 3, 3, 8, 8).double(), torch.rand(3)
    stock = stock_penalty.gradient_penalty(critic, real, fake, alpha=alpha)
    want = torch.autograd.grad(stock, list(critic.parameters()), allow_unused=True, create_graph=create_graph)
    for size in (0, 1 << 40):
        loss, got = found(size)
        torch.testing.assert_close(loss, stock)
        for p, g, w in zip(critic.parameters(), got, want, strict=True):
            zeros = torch.zeros_like(p)
            torch.testing.assert_close(zeros if g is None else g, zeros if w is None else w)


@pytest.mark.parametrize("norm", [lambda: nn.InstanceNorm2d(8, affine=True), lambda: nn.GroupNorm(2, 8)])
def test_activations_in_place_of_norms_and_of_views(norm: Callable[[], nn.Module]) -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), norm(), nn.LeakyReLU(0.2, True), nn.Flatten())
            self.first, self.second = nn.Linear(128, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(self.layers(x)).unflatten(1, (2, 4))
            F.leaky_relu(h, 0.2, inplace=True)
            return self.second(h.flatten(1))

    ours, stock = both(Critic, torch.float64)
    real, fake, alpha = batch()
    got = gradients(ours, gradient_penalty(ours, real, fake, alpha=alpha))
    want = gradients(stock, stock_penalty.gradient_penalty(stock, real, fake, alpha=alpha))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_that_convolutions_take_along(inplace: bool) -> None:
    """Used twice, in front of few channels, in place, and watched by a hook."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.one, self.two = nn.Conv2d(4, 20, 3, padding=1), nn.Conv2d(4, 20, 4, 2, 1)
            self.last = nn.Conv2d(20, 20, 3, padding=1)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            y = F.leaky_relu(self.stem(x), 0.2, inplace)
            a, b = F.relu(self.one(y), inplace), F.leaky_relu(self.two(y), 0.1, inplace)
            if b.requires_grad:
                b.register_hook(self.seen.append)
            pooled = F.avg_pool2d(a, 2) * b
            scaled = F.relu(pooled, inplace)
            return (self.last(b) + self.last(scaled) + y.mean((1, 2, 3))[:, None, None, None]).square().mean((1, 2, 3))

    ours, stock = both(Branches, torch.float32)
    exact = copy.deepcopy(stock).double()
    real, fake, alpha = batch(dtype=torch.float32)
    results = [gradients(ours, gradient_penalty(ours, real, fake, alpha=alpha))]
    for critic, dtype in ((stock, torch.float32), (exact, torch.float64)):
        points = [t.to(dtype) for t in (real, fake)]
        results.append(gradients(critic, stock_penalty.gradient_penalty(critic, *points, alpha=alpha.to(dtype))))
    for got, same, want in zip(*results, strict=True):
        assert_as_accurate(got, same, want)
    torch.testing.assert_close(ours.seen[0], stock.seen[0], rtol=1e-4, atol=1e-6)


def test_other_functions_see_the_layout_of_stock() -> None:
    norm = nn.BatchNorm2d(16)
    first, second = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 1, 3)
    strides = []

    def critic(x: Tensor) -> Tensor:
        h = first(x)
        strides.append(h.stride())
        h = F.dropout(F.leaky_relu(norm(h), 0.2), 0.3)
        return second(h).view(h.size(0), -1).sum(1)

    results = []
    x = torch.randn(5, 3, 8, 8)
    for layers in (nullcontext(), CriticLayers(Scope())):
        torch.manual_seed(3)
        with layers:
            results.append(critic(x.clone().requires_grad_()))
    assert torch.equal(*results)
    assert strides[0] == strides[1]


def test_functions_of_the_tensor_get_no_copy() -> None:
    """Channels_last activations that are changed in place, written to or watched."""
    conv, last = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 1, 3)
    factor = torch.rand(16, 8, 8)

    def results(layers: Any) -> list[Tensor]:
        seen = []
        x = torch.linspace(-1, 1, 5 * 192).view(5, 3, 8, 8).requires_grad_()
        with layers:
            h = conv(x)
            h.register_hook(seen.append)
            h[:, 3] = 1.0
            h.masked_fill_(factor > 0.9, 0.5)
            h.copysign_(factor - 0.5)
            kept = conv(x)
            kept.retain_grad()
            output = last(h * kept)
            (grad,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
            output.sum().backward()
        return [output.detach(), grad, seen[0], kept.grad]

    for got, want in zip(results(CriticLayers(Scope())), results(nullcontext()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("view", [lambda h: h[:, 3], lambda h: h.narrow(1, 2, 5), lambda h: h.transpose(0, 1)])
def test_a_change_that_would_be_lost_is_refused(view: Callable[[Tensor], Tensor]) -> None:
    conv, last = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 1, 8)
    real, fake, alpha = batch(dtype=torch.float32)

    def critic(x: Tensor) -> Tensor:
        h = conv(x)
        view(h).mul_(2.0)
        return last(h)

    params = [*conv.parameters(), *last.parameters()]
    with pytest.raises(RuntimeError, match=r"critic changes a view of an activation in place.*got mul_"):
        gradient_penalty(critic, real, fake, alpha=alpha, params=params)
    with gankern.backend("reference"):
        got = gradient_penalty(critic, real, fake, alpha=alpha, params=params)
    torch.testing.assert_close(got, stock_penalty.gradient_penalty(critic, real, fake, alpha=alpha))
