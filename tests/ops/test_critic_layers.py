"""Group norm, instance norm and average pooling in the critic layers' machinery."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from critics import batch, both, chain_of, gradients, layered
from oracle import assert_as_accurate
from torch import Tensor, nn
from torch.func import functional_call

from gankern import gradient_penalty
from gankern.ops.critic_layers import Declined, Scope
from gankern.ops.gradient_penalty import penalty_points
from gankern.ops.gradient_penalty import reference as stock_penalty


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


NORMS: dict[str, tuple[Tensor, Callable[[bool], nn.Module]]] = {
    "group norm": (torch.randn(2, 6, 2, 3), lambda affine: nn.GroupNorm(3, 6, affine=affine)),
    "channels last": (last(torch.randn(2, 4, 2, 3)), lambda affine: nn.GroupNorm(2, 4, affine=affine)),
    "one group": (torch.randn(2, 4, 5), lambda affine: nn.GroupNorm(1, 4, 1e-3, affine)),
    "vectors": (torch.randn(3, 4), lambda affine: nn.GroupNorm(2, 4, 0.1, affine)),
    "one sample": (torch.randn(1, 4, 3), lambda affine: nn.GroupNorm(2, 4, affine=affine)),
    "instance norm": (torch.randn(2, 3, 2, 2), lambda affine: nn.InstanceNorm2d(3, 1e-2, affine=affine)),
    "instance norm, volume": (torch.randn(1, 2, 2, 1, 2), lambda affine: nn.InstanceNorm3d(2, 1e-2, affine=affine)),
    "layer norm": (torch.randn(2, 4, 2, 3), lambda affine: nn.LayerNorm([2, 3], 1e-2, affine)),
    "layer norm, last": (last(torch.randn(2, 4, 2, 3)), lambda affine: nn.LayerNorm([4, 2, 3], 1e-2, affine)),
}


@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_have_exact_derivatives(name: str, affine: str) -> None:
    x, make = NORMS[name]
    norm = make(affine != "none").double()
    for p in norm.parameters():
        nn.init.normal_(p)
    if affine == "weight":
        norm.bias = None
    x = x.double().requires_grad_()
    run, input_gradient = layered(norm)
    inputs = [x, *(p.detach().requires_grad_() for p in norm.parameters())]
    torch.testing.assert_close(run(*inputs), norm(x))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradcheck(input_gradient, inputs)


POOLS: dict[str, tuple[tuple[int, ...], nn.Module]] = {
    "1d": ((2, 3, 7), nn.AvgPool1d(2)),
    "1d, padded": ((2, 3, 7), nn.AvgPool1d(3, 2, 1)),
    "2d": ((2, 3, 4, 6), nn.AvgPool2d(2)),
    "2d, remainder": ((2, 3, 5, 7), nn.AvgPool2d((2, 3))),
    "2d, one sample, wide": ((1, 1, 3, 40), nn.AvgPool2d(3, ceil_mode=True)),
    "2d, overlapping": ((2, 2, 5, 5), nn.AvgPool2d(3, 1, padding=(1, 1), count_include_pad=False)),
    "2d, ceil": ((2, 2, 5, 5), nn.AvgPool2d(2, ceil_mode=True, divisor_override=3)),
    "2d, ceil remainder": ((2, 2, 5, 5), nn.AvgPool2d((2,), None, 0, True)),
    "3d": ((2, 2, 4, 4, 2), nn.AvgPool3d(2)),
    "adaptive 1d": ((2, 3, 6), nn.AdaptiveAvgPool1d(2)),
    "adaptive 2d": ((2, 3, 4, 6), nn.AdaptiveAvgPool2d(1)),
    "adaptive 2d, uneven": ((2, 3, 5, 6), nn.AdaptiveAvgPool2d((2, 6))),
    "adaptive 3d": ((2, 3, 2, 2, 4), nn.AdaptiveAvgPool3d((1, 2, 2))),
    "adaptive 3d, uneven": ((2, 2, 3, 3, 2), nn.AdaptiveAvgPool3d(2)),
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
    run, input_gradient = layered(pool)
    output, want = run(x), pool(x)
    torch.testing.assert_close(output, want)
    assert output.stride() == want.stride()
    grad = torch.randn_like(want)
    got, want = (torch.autograd.grad(y, x, grad)[0] for y in (output, want))
    torch.testing.assert_close(got, want)
    assert x.dim() == 5 or got.stride() == x.stride()  # in three dimensions aten's backward is contiguous
    assert torch.autograd.gradcheck(run, [x])
    assert torch.autograd.gradgradcheck(run, [x])
    assert torch.autograd.gradcheck(input_gradient, [x])


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
@pytest.mark.parametrize(
    "shape",
    [
        *((2, 1), (70, 3), (5, 64), (300, 17), (1, 3, 5, 7), (3, 17, 37), (40, 2, 9), (9, 20, 4, 67), (33, 64, 8, 4)),
        *((5, 1, 300), (3, 48, 300), (2, 16, 600)),
        # Written past the caches.
        (32, 64, 1024),
    ],
    ids=str,
)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_batch_norm_kernels(shape: tuple[int, ...], last: bool, threads: int) -> None:
    from gankern.ops.critic_layers import cpu, reference

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, grad, tangent = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3))
        x = x + 3
        if last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        for weight, bias in [(None, None), torch.randn(2, shape[1]).to(dtype).unbind()]:

            def results(module: Any, kind: torch.dtype, given=(x, grad, tangent, weight, bias)) -> list[Tensor]:
                x, grad, tangent, weight, bias = (None if t is None else t.to(kind) for t in given)
                y, *moments = module.batch_norm_forward(x, weight, bias, 1e-2)
                first = module.batch_norm_backward(grad, x, weight, *moments[:2], True)
                second = module.batch_norm_double_backward(tangent, grad, x, weight, *moments[:2], True)
                # Float64, but as accurate as what they were summed up in.
                return [y, *(m.to(kind) for m in moments), *first, *second]

            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            got, theirs, exact = results(cpu, dtype), results(reference, wide), results(reference, torch.float64)
            names = ("output", "mean", "rstd", "var", "grad_input", "grad_weight", "grad_bias")
            names += ("d2_grad_output", "d2_input", "d2_weight")
            for name, g, s, e in zip(names, got, theirs, exact, strict=True):
                if dtype == torch.float64:
                    torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11 * (1 + e.abs().max().item()))
                    continue
                count = x.numel() / shape[1]
                floor = e.norm() * 2e-6 + 1e-5 * count**0.5 if dtype == torch.float32 else 0
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
@pytest.mark.parametrize("name", ["group", "instance", "channels last"])
def test_instance_and_group_norm_accuracy(name: str, dtype: torch.dtype) -> None:
    norm = nn.InstanceNorm2d(6, affine=True) if name == "instance" else nn.GroupNorm(3, 6)
    x, (weight, bias) = torch.randn(3, 6, 9, 7) * 2 + 1, torch.randn(2, 6)
    inputs = [t.to(dtype) for t in (last(x) if name == "channels last" else x, weight, bias)]
    grad, tangent = torch.randn(2, *x.shape).to(dtype)
    chain = chain_of(norm)

    def derivatives(ours: bool, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind, copy=True).requires_grad_() for t in inputs]
        first = grad.to(kind, copy=True).requires_grad_()
        scope = Scope()
        held = dict(zip(("weight", "bias"), leaves[1:], strict=True))
        output = chain.run(scope, leaves[0], leaves[1:]) if ours else functional_call(norm, held, leaves[0])
        params = torch.autograd.grad(output, leaves, first, retain_graph=True)
        with scope.input_gradient():
            (inner,) = torch.autograd.grad(output, leaves[0], first, create_graph=True)
        return [output.detach(), *params, *torch.autograd.grad(inner, [first, *leaves[:2]], tangent.to(kind))]

    got, stock = derivatives(True, dtype), derivatives(False, dtype)
    for i, (g, s, e) in enumerate(zip(got, stock, derivatives(False, torch.float64), strict=True)):
        assert_as_accurate(g, s, e, f"result {i}")


def test_what_a_layer_declines_is_stocks() -> None:
    """Images without a batch dimension, and what stock refuses."""
    x = torch.randn(4, 8, 8)
    for critic in (nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Conv2d(4, 2, 3), nn.InstanceNorm2d(4)):
        with pytest.raises(Declined):
            chain_of(critic).run(Scope(), x, list(critic.parameters()))
        torch.testing.assert_close(
            gradient_penalty(critic, x, x, alpha=torch.ones(4)),
            stock_penalty.gradient_penalty(critic, x, x, alpha=torch.ones(4)),
        )
    with pytest.raises(RuntimeError, match=r"divisible|num_channels"):
        gradient_penalty(nn.GroupNorm(4, 4).eval(), x[None, :3], x[None, :3])
    with pytest.raises(ValueError, match="more than 1"):
        gradient_penalty(nn.InstanceNorm2d(4), x[None, :, :1, :1], x[None, :, :1, :1])


def test_channels_last_is_kept() -> None:
    x = last(torch.randn(2, 4, 4, 6)).requires_grad_()
    for module in (nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.AvgPool2d(2)):
        output = layered(module)[0](x, *module.parameters())
        assert output.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output, module(x))
        (grad,) = torch.autograd.grad(output.sin().sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(module(x).sin().sum(), x)[0])


def test_pooling_keeps_no_values_of_its_input() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = layered(nn.AvgPool2d(2))[0](x)
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
    assert torch.equal(layered(critic)[0](x.clone().requires_grad_(), *critic.parameters()), stock)
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
    "change",
    [
        {"weight": torch.randn(8, 4, 3, 3)},
        {"weight": torch.randn(8, 3, 30, 30)},
        {"weight": torch.randn(8, 3, 3)},
        {"bias": torch.randn(5)},
        {"bias": torch.randn(8).double()},
        {"stride": 0},
        {"padding": -1},
    ],
    ids="-".join,
)
def test_what_stock_refuses_is_refused(change: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 8, 8)
    critic = nn.Conv2d(3, 8, 3)
    for name, value in change.items():
        setattr(critic, name, nn.Parameter(value) if isinstance(value, Tensor) else value)
    with pytest.raises((RuntimeError, TypeError)) as stock:
        critic(x)
    with pytest.raises(stock.type):
        gradient_penalty(critic, x, x)


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_that_convolutions_take_along(inplace: bool) -> None:
    """In front of few channels and of many, in place and not, one after the other."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.LeakyReLU(0.2, inplace),
            nn.Conv2d(4, 20, 4, 2, 1),
            nn.ReLU(inplace),
            nn.LeakyReLU(0.1, inplace),
            nn.ConvTranspose2d(20, 20, 3, padding=1),
            nn.LeakyReLU(0.3, inplace),
            nn.Conv2d(20, 20, 3, padding=1),
            nn.Tanh(),
        )

    ours, stock = both(make, torch.float32)
    for module in stock:
        module.inplace = False  # Stock refuses two in a row in place.
    exact = copy.deepcopy(stock).double()
    real, fake, alpha = batch(dtype=torch.float32)
    results = [gradients(ours, gradient_penalty(ours, real, fake, alpha=alpha))]
    for critic, dtype in ((stock, torch.float32), (exact, torch.float64)):
        points = [t.to(dtype) for t in (real, fake)]
        results.append(gradients(critic, stock_penalty.gradient_penalty(critic, *points, alpha=alpha.to(dtype))))
    for got, same, want in zip(*results, strict=True):
        assert_as_accurate(got, same, want)
