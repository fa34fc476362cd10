"""The penalty in a training step: GradScaler, accumulation, modes, dropout, parametrizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from critics import CRITICS, Residual, batch, both, gradients, layered, plain
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gankern import gradient_penalty, penalties
from gankern.ops.gradient_penalty import reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:the critic has batch norm"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # Dynamo's own reading
]


def critic_loss(critic: nn.Module, data: tuple[Tensor, Tensor, Tensor], penalty: Callable[..., Tensor]) -> Tensor:
    real, fake, alpha = data
    return critic(fake).mean() - critic(real).mean() + penalty(critic, real, fake, alpha=alpha)


def test_grad_scaler_scales_the_total_loss_alone() -> None:
    critic = Residual()
    data = batch(dtype=torch.float32)
    want = gradients(critic, critic_loss(critic, data, gradient_penalty))
    # A factor this large would overflow the penalty's inner gradient, were it scaled before it is squared.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**70)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    optimizer.zero_grad()
    scaler.scale(critic_loss(critic, data, gradient_penalty)).backward()
    scaler.unscale_(optimizer)
    for p, w in zip(critic.parameters(), want, strict=True):
        # A power of two: nothing is rounded.
        assert p.grad is not None
        assert torch.equal(p.grad, w)
    before = [p.detach().clone() for p in critic.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**70
    for p, b, w in zip(critic.parameters(), before, want, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * w)


def test_grad_scaler_under_autocast() -> None:
    critic = Residual()
    data = batch(16, torch.float32)
    exact = Residual().double()
    exact.load_state_dict(critic.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = critic_loss(critic, data, gradient_penalty)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    want = gradients(exact, critic_loss(exact, tuple(t.double() for t in data), reference.gradient_penalty))
    got = torch.cat([p.grad.flatten() for p in critic.parameters() if p.grad is not None]).double()
    exact_gradients = torch.cat([w.flatten() for w in want])
    assert (got - exact_gradients).norm() <= 0.05 * exact_gradients.norm()


def test_micro_batches_accumulate_to_the_whole() -> None:
    critic = Residual().double()
    data = batch(8)
    want = gradients(critic, critic_loss(critic, data, gradient_penalty))
    critic.zero_grad()
    for half in zip(*(t.chunk(2) for t in data), strict=True):
        (critic_loss(critic, half, gradient_penalty) / 2).backward()
    for p, w in zip(critic.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-9, atol=1e-12)


def test_two_penalties_in_one_loss() -> None:
    ours, stock = both(Residual)
    real, fake, _ = batch()
    got = gradients(ours, penalties.r1(ours, real) + 2 * penalties.r2(ours, fake))
    want = gradients(stock, 5 * _squared_norm(stock, real) + 10 * _squared_norm(stock, fake))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def _squared_norm(critic: nn.Module, points: Tensor) -> Tensor:
    return reference.penalty_at(critic, points, weight=1.0, squared=True)


def test_frozen_parameters_get_none() -> None:
    ours, stock = both(CRITICS["frozen"])
    data = batch()
    got = gradients(ours, critic_loss(ours, data, gradient_penalty))
    torch.testing.assert_close(got, gradients(stock, critic_loss(stock, data, reference.gradient_penalty)))
    assert any(not p.requires_grad for p in ours.parameters())
    assert all((p.grad is not None) == p.requires_grad for p in ours.parameters())
    # Frozen and released between two calls: nothing of the first is kept.
    ours.requires_grad_(False)
    real, fake, alpha = data
    assert not gradient_penalty(ours, real, fake, alpha=alpha).requires_grad
    stock.requires_grad_(True)
    got = gradients(ours.requires_grad_(True), critic_loss(ours, data, gradient_penalty))
    torch.testing.assert_close(got, gradients(stock, critic_loss(stock, data, reference.gradient_penalty)))


@pytest.mark.parametrize("name", ["tied", "patch map", "plain", "linear", "weight norm", "minibatch"])
def test_whole_critic_step(name: str) -> None:
    """Scores of shape (N, features), (N, 1, H, W), (N,) and (N, 1)."""
    ours, stock = both(CRITICS[name])
    data = batch()
    got = gradients(ours, critic_loss(ours, data, gradient_penalty))
    want = gradients(stock, critic_loss(stock, data, reference.gradient_penalty))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["batch norm", "spectral norm", "weight norm", "dropout"])
def test_eval_mode(name: str) -> None:
    makers: dict[str, Any] = {**CRITICS, "dropout": dropout}
    ours, stock = both(makers[name])
    buffers = [b.clone() for b in ours.eval().buffers()]
    data = batch()
    got = gradients(ours, critic_loss(ours, data, gradient_penalty))
    want = gradients(stock.eval(), critic_loss(stock, data, reference.gradient_penalty))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert not ours.training
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), buffers, strict=True))


def dropout() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.LayerNorm([8, 6, 6]),
        nn.ReLU(),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Linear(288, 16),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(16, 1),
    )


@pytest.mark.parametrize("create_graph", [False, True])
def test_dropout_draws_as_stock_does(create_graph: bool) -> None:
    """One mask in all passes, alpha drawn before it, and the generator left where stock leaves it."""
    ours, stock = both(dropout, torch.float32)
    real, fake, _ = batch(dtype=torch.float32)
    torch.manual_seed(4)
    got = gradients(ours, gradient_penalty(ours, real, fake, create_graph=create_graph))
    after = torch.rand(3)
    torch.manual_seed(4)
    want = gradients(stock, reference.gradient_penalty(stock, real, fake))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(5)
    other = gradients(ours, gradient_penalty(ours, real, fake))
    assert not torch.allclose(other[-2], want[-2], rtol=1e-2)


def test_power_iteration_advances_once() -> None:
    ours, stock = both(CRITICS["spectral norm"])
    data = batch()
    start = [b.clone() for b in ours.buffers()]
    calls: list[int] = []
    (norm,) = ours[0].parametrizations.weight
    power = norm._power_method
    norm._power_method = lambda *args: (calls.append(1), power(*args))[1]
    for _ in range(3):
        real, fake, alpha = data
        got = gradients(ours, gradient_penalty(ours, real, fake, alpha=alpha))
        want = gradients(stock, reference.gradient_penalty(stock, real, fake, alpha=alpha))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
        for a, b in zip(ours.buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert len(calls) == 3
    assert not any(torch.equal(a, b) for a, b in zip(ours.buffers(), start, strict=True))


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_parametrized_residual_critic(norm: Callable[..., nn.Module]) -> None:
    def make() -> nn.Module:
        critic = Residual()
        for layer in (critic.stem, critic.conv, critic.head):
            norm(layer)
        return critic

    torch.manual_seed(0)
    ours = make().double()
    stock = make().double()
    stock.load_state_dict(ours.state_dict())
    data = batch()
    for _ in range(2):
        got = gradients(ours, critic_loss(ours, data, gradient_penalty))
        want = gradients(stock, critic_loss(stock, data, reference.gradient_penalty))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(list(ours.buffers()), list(stock.buffers()))


def test_autocast_whole_step_in_norm() -> None:
    ours, stock = both(plain, torch.float32)
    data = batch(16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = critic_loss(ours, data, gradient_penalty)
    got = torch.cat([g.flatten() for g in gradients(ours, loss)])
    # float32 is the measure: bfloat16's own rounding is what is allowed for.
    want = torch.cat([g.flatten() for g in gradients(stock, critic_loss(stock, data, reference.gradient_penalty))])
    assert (got - want).norm() <= 0.03 * want.norm()


@pytest.mark.parametrize(
    "name",
    ["plain", "patch map", "spectral norm", "batch norm", "residual"],
)
def test_compiled_critic_trains_as_stock(name: str) -> None:
    """Forward in one graph, backward by autograd outside, an optimizer's steps in between."""
    ours, stock = both(CRITICS[name], torch.float32)
    fullgraph = name in ("plain", "patch map")
    compiled = torch.compile(critic_loss, fullgraph=fullgraph, backend="aot_eager")
    optimizers = [torch.optim.SGD(c.parameters(), lr=0.01) for c in (ours, stock)]
    for _ in range(3):
        data = batch(dtype=torch.float32)
        got = gradients(ours, compiled(ours, data, gradient_penalty))
        want = gradients(stock, critic_loss(stock, data, reference.gradient_penalty))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        for optimizer in optimizers:
            optimizer.step()


def test_compiled_graph_takes_the_weights_of_the_moment() -> None:
    """Changed in the graph, and by a hook that came after it."""
    ours, stock = both(plain)
    real, fake, alpha = batch()

    def step(critic: nn.Module) -> Tensor:
        with torch.no_grad():
            for p in critic.parameters():
                p.mul_(1.5)
        return gradient_penalty(critic, real, fake, alpha=alpha)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(gradients(ours, compiled(ours)), gradients(stock, step(stock)))
    ours[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(RuntimeError, match=r"0 \(Conv2d\) has a hook. Call torch.compiler.reset"):
        compiled(ours)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "options",
    [(2,), (3, 2, 1), ((3, 2), (2, 1), (1, 0), True), (3, 2, 1, True, False), (2, None, 0, False, True, 3), (3, (1,))],
    ids=str,
)
def test_average_pooling_has_exact_derivatives(options: tuple[Any, ...], channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()

    pool = nn.AvgPool2d(*options)
    run, input_gradient = layered(pool)
    assert torch.equal(run(x), pool(x))
    cotangent = torch.randn_like(pool(x))
    assert torch.equal(*(torch.autograd.grad(f(x), x, cotangent)[0] for f in (run, pool)))
    assert torch.autograd.gradcheck(input_gradient, (x,), fast_mode=True)


def test_batch_norm_warning_under_compile() -> None:
    ours, stock = both(CRITICS["batch norm"], torch.float32)
    data = batch(dtype=torch.float32)
    compiled = torch.compile(critic_loss, backend="eager")
    got = gradients(ours, compiled(ours, data, gradient_penalty))
    want = gradients(stock, critic_loss(stock, data, reference.gradient_penalty))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
