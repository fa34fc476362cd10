from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from critics import CRITICS, Minibatch, Residual, batch, both, gradients, layered, plain, watched_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate, layouts
from processors import avx512
from torch import Tensor, nn

import gankern
from gankern import gradient_penalty, penalties
from gankern.ops.gradient_penalty import autograd, cpu, reference

pytestmark = pytest.mark.filterwarnings("ignore:the critic has batch norm")


@pytest.mark.parametrize("name", CRITICS)
def test_gradients_are_stocks_for_any_critic(name: str) -> None:
    ours, stock = both(CRITICS[name])
    real, fake, alpha = batch()
    options: dict[str, Any] = {"weight": 7.0, "target": 0.3}
    got = gradient_penalty(ours, real, fake, alpha=alpha, **options)
    want = reference.gradient_penalty(stock, real, fake, alpha=alpha, **options)
    torch.testing.assert_close(got, want)
    for g, w in zip(gradients(ours, got), gradients(stock, want), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)
    for g, w in zip(ours.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", ["plain", "residual", "minibatch"])
def test_float32_is_as_accurate_as_stock(name: str) -> None:
    exact = CRITICS[name]().double()
    real, fake, alpha = batch(8)
    results = []
    for function, dtype in [
        (gradient_penalty, torch.float32),
        (reference.gradient_penalty, torch.float32),
        (reference.gradient_penalty, torch.float64),
    ]:
        critic = copy.deepcopy(exact).to(dtype)
        loss = function(critic, real.to(dtype), fake.to(dtype), alpha=alpha.to(dtype))
        grads = torch.cat([g.flatten() for g in gradients(critic, loss)])
        results.append((loss.detach(), grads))
    for ours, stock, best in zip(*results, strict=True):
        assert_as_accurate(ours, stock, best, name)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 3, 7, 5), (2, 3000)], ids=str)
def test_tail_and_interpolation_kernels(dtype: torch.dtype, shape: tuple[int, ...], threads: int) -> None:
    real, fake = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    alpha = torch.rand(shape[0])
    kinds: list[torch.dtype] = [dtype, torch.float64]
    stock, exact = (reference.interpolate(real.to(k), fake.to(k), alpha) for k in kinds)
    assert_as_accurate(cpu.interpolate(real, fake, alpha), stock, exact, "interpolate")
    for options in [
        (10.0, 1.0, False, False),
        (3.0, 5.0, True, False),
        (0.5, 9.0, True, True),
        (1.0, 0.0, False, False),
    ]:
        stock, exact = (reference.tail(real.to(k), *options) for k in kinds)
        for got, s, e in zip(cpu.tail(real, *options), stock, exact, strict=True):
            assert_as_accurate(got, s, e, f"tail {options}")


@pytest.mark.kernel
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("size", [1, 16, 37, 1500])
def test_layer_norm_kernels(rows: int, size: int, threads: int) -> None:
    from gankern.ops.critic_layers import cpu, reference

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, grad, tangent = (torch.randn(rows, size, dtype=torch.float64).to(dtype) for _ in range(3))
        x = x + 3
        for weight, bias in [(None, None), (torch.randn(size).to(dtype), torch.randn(size).to(dtype))]:

            def results(module: Any, kind: torch.dtype, given=(x, grad, tangent, weight, bias)) -> list[Tensor]:
                x, grad, tangent, weight, bias = (None if t is None else t.to(kind) for t in given)
                y, mean, rstd = module.layer_norm_forward(x, weight, bias, 1e-2)
                first = module.layer_norm_backward(grad, x, weight, mean, rstd, True)
                second = module.layer_norm_double_backward(tangent, grad, x, weight, mean, rstd, True)
                return [y, *first, *second]

            # The plain formulas in float32 stand for stock in bfloat16, which has none of its own at this precision.
            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            got, stock, exact = results(cpu, dtype), results(reference, wide), results(reference, torch.float64)
            names = ("output", "grad_input", "grad_weight", "grad_bias", "d2_grad_output", "d2_input", "d2_weight")
            for name, g, s, e in zip(names, got, stock, exact, strict=True):
                # What cancels leaves rounding errors of the terms, not of the difference.
                floor = {torch.float32: e.norm() * 2e-6 + 1e-5 * size**0.5, torch.float64: 1e-14}.get(dtype, 0)
                if (g.double() - e).norm() > floor:
                    assert_as_accurate(g, s.to(dtype), e, f"{name} {dtype}")


def test_critic_layers_have_exact_derivatives() -> None:
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    layers = nn.Conv2d(2, 3, 3, 2, 1), nn.Linear(2, 3), nn.LayerNorm([3, 2, 3]), nn.LeakyReLU(0.2), nn.Tanh()
    critic = nn.Sequential(*layers).double()
    run, input_gradient = layered(critic)
    inputs = [x, *critic.parameters()]
    torch.testing.assert_close(run(*inputs), critic(x))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradcheck(input_gradient, inputs)


def test_critic_layers_have_no_third_derivative() -> None:
    critic = nn.Sequential(nn.Conv2d(2, 3, 3), nn.LayerNorm(2), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(12, 1))
    run, input_gradient = layered(critic)
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    params = [p.detach().requires_grad_() for p in critic.parameters()]
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(run(x, *params).sum(), params, create_graph=True)
    first = input_gradient(x, *params).sum()
    with pytest.raises(RuntimeError, match=r"differentiated twice|once_differentiable"):
        torch.autograd.grad(torch.autograd.grad(first, params[0], create_graph=True)[0].sum(), params[0])


def smooth() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2), nn.Softplus(), nn.Linear(2, 1)
    )


@pytest.mark.parametrize("make", [Residual, Minibatch, smooth], ids=["residual", "minibatch", "smooth"])
def test_derivatives_of_the_penalty_itself(make: Callable[[], nn.Module]) -> None:
    critic = make().double()
    real, fake, alpha = batch(3)
    names, params = zip(*critic.named_parameters(), strict=True)
    # gradcheck moves the parameters one by one: small ones are enough to see a wrong formula.
    chosen = [i for i, p in enumerate(params) if p.numel() <= 40]

    def penalty(create_graph: bool) -> Callable[..., Tensor]:
        def function(*values: Tensor) -> Tensor:
            held = dict(critic.named_parameters()) | {names[i]: v for i, v in zip(chosen, values, strict=True)}
            return gradient_penalty(
                lambda x: torch.func.functional_call(critic, held, (x,)),
                real,
                fake,
                alpha=alpha,
                params=list(held.values()),
                create_graph=create_graph,
            )

        return function

    values = [params[i].detach().clone().requires_grad_() for i in chosen]
    assert torch.autograd.gradcheck(penalty(False), values)
    assert torch.autograd.gradcheck(penalty(True), values)
    if make is not smooth:
        return  # Stock's third derivatives of layer norm take the mean and deviation for constants.
    small = [v for v in values if v.numel() <= 8]
    fixed = {i: v for i, v in enumerate(values) if v.numel() > 8}

    def of_small(*given: Tensor) -> Tensor:
        rest = iter(given)
        return penalty(True)(*(fixed[i] if i in fixed else next(rest) for i in range(len(values))))

    assert torch.autograd.gradgradcheck(of_small, small)


def test_a_second_differentiation_is_refused_unless_asked_for() -> None:
    critic = plain().double()
    real, fake, alpha = batch()
    loss = gradient_penalty(critic, real, fake, alpha=alpha)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, list(critic.parameters()), create_graph=True)
    loss = gradient_penalty(critic, real, fake, alpha=alpha, create_graph=True)
    (grad,) = torch.autograd.grad(loss, critic[0].weight, create_graph=True)
    assert grad.requires_grad


def conv_calls(step: Callable[[], Any]) -> dict[str, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    passes = ("aten::convolution", "aten::convolution_backward")
    return {e.key: e.count for e in profile.key_averages() if e.key in passes or e.key.startswith("gankern::conv")}


@avx512
def test_four_passes_a_layer() -> None:
    critic = plain()
    real, fake, alpha = batch(dtype=torch.float32)
    loss = gradient_penalty(critic, real, fake, alpha=alpha)
    calls = conv_calls(lambda: gradient_penalty(critic, real, fake, alpha=alpha))
    # Three layers: forward and tangent (not of the last: its output's gradient is constant); input and weight gradient.
    assert calls == {"gankern::conv": 3 + 2, "gankern::conv_input_grad": 3, "gankern::conv_weight_grad": 3}
    assert conv_calls(loss.backward) == {}


def test_no_zero_tensor_is_driven_through_the_critic() -> None:
    critic = plain()
    real, fake, alpha = batch(dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradient_penalty(critic, real, fake, alpha=alpha)
    zeros = sum(e.count for e in profile.key_averages() if e.key in ("aten::zeros_like", "aten::zeros"))
    # The gradients of two biases, on which the penalty does not depend; stock has none for the third.
    assert zeros == 2


def test_biases_get_zeros_or_nothing_as_in_stock() -> None:
    critic = plain()
    real, fake, _ = batch(dtype=torch.float32)
    gradient_penalty(critic, real, fake).backward()
    assert critic[0].bias.grad.eq(0).all()
    assert critic[2].bias.grad.eq(0).all()
    assert critic[-2].bias.grad is None


def test_zero_gradient_gives_zero_and_no_nan() -> None:
    critic = nn.Linear(4, 1)
    nn.init.zeros_(critic.weight)
    x = torch.randn(3, 4)
    for loss in (gradient_penalty(critic, x, x), penalties.r1(critic, x), penalties.dragan(critic, x)):
        critic.zero_grad()
        loss.backward()
        assert critic.weight.grad is not None
        assert critic.weight.grad.eq(0).all()
    assert gradient_penalty(critic, x, x, weight=2.0, target=3.0).item() == pytest.approx(18)


def test_gradients_reach_real_and_fake_that_require_them() -> None:
    ours, stock = both(Residual)
    results = []
    for function, critic in ((gradient_penalty, ours), (reference.gradient_penalty, stock)):
        torch.manual_seed(1)
        real, fake, alpha = batch()
        real.requires_grad_(), fake.requires_grad_()
        function(critic, real, fake, alpha=alpha).backward()
        results.append((real.grad, fake.grad, *(p.grad for p in critic.parameters() if p.grad is not None)))
    torch.testing.assert_close(results[0][:2], results[1][:2])


def test_one_sided_and_family() -> None:
    ours, stock = both(Residual)
    real, fake, alpha = batch()
    cases: list[tuple[Tensor, Tensor]] = []
    for target in (0.001, 100.0):
        cases.append(
            (
                gradient_penalty(ours, real, fake, alpha=alpha, one_sided=True, target=target),
                reference.gradient_penalty(stock, real, fake, alpha=alpha, one_sided=True, target=target),
            )
        )
    at = reference.penalty_at
    cases.append((penalties.r1(ours, real, weight=3.0), at(stock, real, weight=1.5, squared=True)))
    cases.append((penalties.r2(ours, fake, weight=3.0), at(stock, fake, weight=1.5, squared=True)))
    between = alpha * real + (1 - alpha) * fake
    cases.append(
        (penalties.zero_centered(ours, real, fake, alpha=alpha), at(stock, between, weight=10.0, squared=True))
    )
    seeds = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    noise = torch.rand(real.shape, dtype=real.dtype, generator=seeds[1])
    points = real + 0.5 * real.std(correction=0) * noise
    cases.append((penalties.dragan(ours, real, generator=seeds[0]), at(stock, points, weight=10.0, target=1.0)))
    for got, want in cases:
        torch.testing.assert_close(got, want)
        for g, w in zip(gradients(ours, got), gradients(stock, want), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def test_alpha_is_one_uniform_number_a_sample() -> None:
    real, fake = torch.zeros(4000, 1, 2, 2), torch.ones(4000, 1, 2, 2)
    seen = []
    gradient_penalty(lambda x: seen.append(x.detach().clone()) or x.sum(), real, fake, params=PARAMS)
    points = seen[0].flatten(1)
    assert points.eq(points[:, :1]).all()
    histogram = points[:, 0].histc(10, 0, 1)
    assert histogram.min() > 300
    torch.manual_seed(3)
    want = 1 - torch.rand(4000)
    torch.manual_seed(3)
    gradient_penalty(lambda x: seen.append(x.detach().clone()) or x.sum(), real, fake, params=PARAMS)
    torch.testing.assert_close(seen[1][:, 0, 0, 0], want)
    generator = torch.Generator().manual_seed(3)
    gradient_penalty(lambda x: seen.append(x) or x.sum(), real, fake, params=PARAMS, generator=generator)
    assert torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("kind", ["sliced", "transposed", "expanded", "channels_last"])
def test_layouts(kind: str) -> None:
    ours, stock = both(Residual)
    real, fake, alpha = batch()
    real, fake = layouts(real)[kind], layouts(fake)["contiguous"]
    got, want = (
        gradients(critic, function(critic, real, fake, alpha=alpha))
        for function, critic in ((gradient_penalty, ours), (reference.gradient_penalty, stock))
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_channels_last_critic_gets_channels_last_gradients() -> None:
    critic = plain().to(memory_format=torch.channels_last)
    real, fake, alpha = (t.contiguous(memory_format=torch.channels_last) for t in batch(dtype=torch.float32))
    gradient_penalty(critic, real, fake, alpha=alpha).backward()
    assert all(p.grad.stride() == p.stride() for p in critic.parameters() if p.grad is not None)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 5),
    channels=st.integers(1, 4),
    size=st.integers(2, 9),
    width=st.integers(1, 5),
    kernel=st.integers(1, 2),
    stride=st.integers(1, 3),
    norm=st.booleans(),
    one_sided=st.booleans(),
)
def test_any_size(
    n: int, channels: int, size: int, width: int, kernel: int, stride: int, norm: bool, one_sided: bool
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(n)
        conv = nn.Conv2d(channels, width, kernel, stride, padding=1)
        out = conv(torch.zeros(1, channels, size, size)).shape[1:]
        middle = nn.LayerNorm(out) if norm else nn.Identity()
        return nn.Sequential(conv, middle, nn.LeakyReLU(0.2), nn.Flatten(), nn.LazyLinear(1))

    critic = make()
    critic(torch.zeros(1, channels, size, size))
    ours, stock = both(lambda: critic)
    real, fake = torch.randn(2, n, channels, size, size, dtype=torch.float64)
    alpha = torch.rand(n, dtype=torch.float64)
    options: dict[str, Any] = {"alpha": alpha, "target": 0.1, "one_sided": one_sided}
    got = gradients(ours, gradient_penalty(ours, real, fake, **options))
    want = gradients(stock, reference.gradient_penalty(stock, real, fake, **options))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_whole_critic_loss_compiles_into_one_graph() -> None:
    ours, stock = both(plain, torch.float32)
    real, fake, alpha = batch(dtype=torch.float32)

    def loss(critic: nn.Module, penalty: Callable[..., Tensor]) -> Tensor:
        return critic(fake).mean() - critic(real).mean() + penalty(critic, real, fake, alpha=alpha)

    got = gradients(ours, torch.compile(loss, fullgraph=True)(ours, gradient_penalty))
    want = gradients(stock, loss(stock, reference.gradient_penalty))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_opcheck() -> None:
    critic = plain()
    real, fake, alpha = batch(dtype=torch.float32)
    handle, _ = autograd.capturable(critic)
    params = [p.detach() for p in critic.parameters()]
    for want_points in (True, False):
        arguments = (real, params, handle, 10.0, 1.0, False, False, want_points, [True] * len(params), None)
        torch.library.opcheck(torch.ops.gankern.gradient_penalty.default, arguments)
    torch.library.opcheck(torch.ops.gankern.interpolate.default, (real, fake, alpha.flatten()))


def test_autocast_and_grad_scaler() -> None:
    ours, stock = both(plain, torch.float32)
    real, fake, alpha = batch(16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        scaled = gradient_penalty(ours, real, fake, alpha=alpha) * 1024
    got = torch.cat([g.flatten() for g in gradients(ours, scaled)]) / 1024
    with torch.autocast("cpu", torch.bfloat16):
        loss = reference.gradient_penalty(stock, real, fake, alpha=alpha)
    low = torch.cat([g.flatten() for g in gradients(stock, loss)])
    stock.double()
    exact = torch.cat(
        [
            g.flatten()
            for g in gradients(
                stock, reference.gradient_penalty(stock, real.double(), fake.double(), alpha=alpha.double())
            )
        ]
    )
    assert_as_accurate(got, low, exact, "autocast")


def test_fake_of_another_dtype_is_promoted() -> None:
    ours, stock = both(plain, torch.float32)
    real, fake, alpha = batch(dtype=torch.float32)
    got, want = (
        gradients(critic, function(critic, real, fake.bfloat16(), alpha=alpha))
        for function, critic in ((gradient_penalty, ours), (reference.gradient_penalty, stock))
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_no_graph_is_kept() -> None:
    critic = plain()
    real, fake, _ = batch(dtype=torch.float32)
    with watched_kernels() as seen:
        loss = gradient_penalty(critic, real, fake)
    gc.collect()
    assert len(seen) == 10
    assert [r() for r in seen if r() is not None] == []
    assert loss.grad_fn is not None
    reference_count = weakref.ref(critic)
    del critic, loss
    gc.collect()
    assert reference_count() is None


@avx512
def test_without_gradients_only_the_value_is_computed() -> None:
    critic = plain()
    real, fake, alpha = batch(dtype=torch.float32)
    with torch.no_grad():
        value = gradient_penalty(critic, real, fake, alpha=alpha)
        calls = conv_calls(lambda: gradient_penalty(critic, real, fake, alpha=alpha))
    assert not value.requires_grad
    assert calls == {"gankern::conv": 3, "gankern::conv_input_grad": 3}
    torch.testing.assert_close(value, gradient_penalty(critic, real, fake, alpha=alpha).detach())


def test_dropout_has_one_mask() -> None:
    ours, stock = both(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 50), nn.Dropout(0.5), nn.Linear(50, 1)))
    real, fake, alpha = batch()
    results = []
    for function, critic in ((gradient_penalty, ours), (reference.gradient_penalty, stock)):
        torch.manual_seed(2)
        results.append(gradients(critic, function(critic, real, fake, alpha=alpha)))
    torch.testing.assert_close(*results)


def test_gradients_accumulate() -> None:
    critic = plain().double()
    real, fake, alpha = batch()
    once = gradients(critic, gradient_penalty(critic, real, fake, alpha=alpha))
    gradient_penalty(critic, real, fake, alpha=alpha).backward()
    for p, g in zip(critic.parameters(), once, strict=True):
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, 2 * g)


@pytest.mark.filterwarnings("default")
def test_batch_norm_warns_once() -> None:
    from gankern.ops.gradient_penalty import _warn_once

    _warn_once.cache_clear()
    critic = CRITICS["batch norm"]().double()
    real, fake, _ = batch()
    with pytest.warns(UserWarning, match="couples the samples"):
        gradient_penalty(critic, real, fake)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_penalty(critic, real, fake)
        gradient_penalty(critic.eval(), real, fake)


def test_same_bits_on_every_run() -> None:
    critic = Residual()
    real, fake, alpha = batch(dtype=torch.float32)
    first, second = (gradients(critic, gradient_penalty(critic, real, fake, alpha=alpha)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiled_critic_is_unwrapped() -> None:
    critic = plain()
    real, fake, alpha = batch(dtype=torch.float32)
    want = gradients(critic, gradient_penalty(critic, real, fake, alpha=alpha))
    compiled = torch.compile(critic)
    torch.testing.assert_close(gradients(critic, gradient_penalty(compiled, real, fake, alpha=alpha)), want)


PARAMS = [nn.Parameter(torch.ones(1))]
X = torch.ones(3, 2)
LINEAR = nn.Linear(2, 1)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"critic": 3}, TypeError, "critic"),
        ({"critic": lambda x: x.sum()}, ValueError, "params"),
        ({"critic": lambda x: (x,), "params": PARAMS}, TypeError, "critic"),
        ({"critic": lambda x: torch.ones(3, requires_grad=True), "params": PARAMS}, ValueError, "critic"),
        ({"real": None}, TypeError, "real"),
        ({"real": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "real"),
        ({"real": torch.ones(0, 2), "fake": torch.ones(0, 2)}, ValueError, "real"),
        ({"real": torch.ones(3, 0), "fake": torch.ones(3, 0)}, ValueError, "real"),
        ({"fake": torch.ones(4, 2)}, ValueError, "fake"),
        ({"fake": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "fake"),
        ({"fake": torch.ones(3, 2, device="meta")}, ValueError, "fake"),
        ({"weight": "10"}, TypeError, "weight"),
        ({"weight": float("nan")}, ValueError, "weight"),
        ({"target": -1.0}, ValueError, "target"),
        ({"one_sided": 1}, TypeError, "one_sided"),
        ({"alpha": 0.5}, TypeError, "alpha"),
        ({"alpha": torch.rand(3, 2)}, ValueError, "alpha"),
        ({"alpha": torch.rand(3), "generator": torch.Generator()}, ValueError, "generator"),
        ({"generator": 3}, TypeError, "generator"),
        ({"params": 3}, TypeError, "params"),
        ({"params": [1]}, TypeError, "params"),
        ({"params": []}, ValueError, "params must have at least one"),
        ({"params": iter(())}, ValueError, "params must have at least one"),
        ({"create_graph": "yes"}, TypeError, "create_graph"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else v.__name__ if callable(v) else str(v),
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"critic": LINEAR, "real": X, "fake": X}
    with pytest.raises(error, match=message):
        gradient_penalty(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("function", "changed", "message"),
    [
        (penalties.r1, {"real": 3}, "real"),
        (penalties.r1, {"weight": None}, "weight"),
        (penalties.r2, {"fake": torch.ones(0, 2)}, "fake"),
        (penalties.r2, {"params": 3}, "params"),
        (penalties.dragan, {"scale": -1}, "scale"),
        (penalties.dragan, {"generator": "g"}, "generator"),
        (penalties.dragan, {"target": "1"}, "target"),
        (penalties.zero_centered, {"alpha": torch.rand(7)}, "alpha"),
        (penalties.zero_centered, {"create_graph": 1}, "create_graph"),
        (penalties.zero_centered, {"critic": None}, "critic"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else v.__name__ if callable(v) else str(v),
)
def test_bad_input_of_the_family(function: Any, changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"critic": LINEAR}
    if function is not penalties.r2:
        arguments["real"] = X
    if function in (penalties.r2, penalties.zero_centered):
        arguments["fake"] = X
    with pytest.raises((TypeError, ValueError), match=message):
        function(**{**arguments, **changed})


def test_backend_asked_for_by_name() -> None:
    critic = plain().double()
    real, fake, alpha = batch()
    want = gradients(critic, gradient_penalty(critic, real, fake, alpha=alpha))
    with gankern.backend("reference"):
        got = gradients(critic, gradient_penalty(critic, real, fake, alpha=alpha))
    torch.testing.assert_close(got, want)
    with pytest.raises(gankern.BackendUnavailable, match="cuda"), gankern.backend("cuda"):
        gradient_penalty(critic, real, fake, alpha=alpha)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_follow_the_factor_of_the_loss(bias: bool) -> None:
    # Weights large and small: their products with the factor take different ways.
    critic = nn.Sequential(nn.Flatten(), nn.Linear(192, 64, bias=bias), nn.ReLU(), nn.Linear(64, 1, bias=bias))
    critic = critic[:2] if not bias else critic
    real, fake, alpha = batch(dtype=torch.float32)
    params = list(critic.parameters())[: 3 if bias else 1]
    once = torch.autograd.grad(gradient_penalty(critic, real, fake, alpha=alpha), params)
    thrice = torch.autograd.grad(3 * gradient_penalty(critic, real, fake, alpha=alpha), params)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(b, 3 * a)
