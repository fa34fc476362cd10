"""Penalties of critics that change activations, noise or their images in place, planned, as stock has them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import gankern
from gankern.compiler import planning
from gankern.compiler.cache import known_plans
from gankern.compiler.passes import in_place

LR = nn.LeakyReLU


def sequential(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Layers between three convolutions, twice each."""

    def make() -> nn.Module:
        blocks = [m for i in (3, 16) for m in (nn.Conv2d(i, 16, 4, 2, 1), *(layer() for layer in layers))]
        return nn.Sequential(*blocks, nn.Softplus(), nn.Conv2d(16, 1, 4), nn.Flatten(0))

    return make


class Written(nn.Module):
    """A critic whose activation a function changes."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.first, self.second, self.last = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.softplus(self.change(self, self.first(x)))).mean((1, 2, 3))


def _channels(_: nn.Module, h: Tensor) -> Tensor:
    h[:, :4] = 0
    return h


def _view(_: nn.Module, h: Tensor) -> Tensor:
    h.view(h.size(0), -1).mul_(2)
    return h


def _view_of_written(_: nn.Module, h: Tensor) -> Tensor:
    flat = F.hardswish(h, inplace=True).flatten(2)
    flat.tanh_()
    return h + flat.view_as(h)


def _sum(net: Any, h: Tensor) -> Tensor:
    g = net.second(F.relu(h, inplace=True))
    g += h
    return F.leaky_relu_(g, 0.2)


def _noise(_: nn.Module, h: Tensor) -> Tensor:
    h += torch.empty_like(h).normal_().mul_(0.1)
    return F.leaky_relu_(h, 0.2)


def _drawn_into(net: Any, h: Tensor) -> Tensor:
    other = net.second(h).detach()
    return h * other.bernoulli_(0.5)


def _slice(net: Any, h: Tensor) -> Tensor:
    half = h.detach()[:, ::2]
    half.tanh_().normal_()
    return torch.cat([half, net.second(h)[:, ::2]], 1)


def _promoted(_: nn.Module, h: Tensor) -> Tensor:
    return h.add_(torch.arange(16, dtype=torch.float64).view(16, 1, 1))


def _normalised(_: nn.Module, h: Tensor) -> Tensor:
    other = h.detach().clone()
    other.sub_(other.mean()).div_(other.std())
    return h * other.clamp_(-1, 1)


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": sequential(lambda: nn.BatchNorm2d(16), lambda: LR(0.2, True)),
    "instance norm": sequential(lambda: nn.InstanceNorm2d(16), lambda: LR(0.2, True)),
    "group norm": sequential(lambda: nn.GroupNorm(4, 16), lambda: LR(0.2, True)),
    "dropout": sequential(lambda: LR(0.2, True), lambda: nn.Dropout(0.3)),
    "dropout of channels": sequential(lambda: LR(0.2, True), lambda: nn.Dropout2d(0.25), lambda: nn.BatchNorm2d(16)),
    "dropout before a norm": sequential(lambda: nn.Dropout(0.3), lambda: nn.InstanceNorm2d(16), lambda: nn.ReLU(True)),
    "dropout in place": sequential(lambda: nn.Dropout(0.3, True), lambda: LR(0.2, True)),
    "alpha dropout": sequential(lambda: nn.SELU(True), lambda: nn.AlphaDropout(0.2)),
    "random slopes": sequential(lambda: nn.RReLU(inplace=True)),
    "smooth": sequential(lambda: nn.SiLU(True), lambda: nn.BatchNorm2d(16), lambda: nn.Mish(True)),
    "hardswish": sequential(lambda: nn.Hardswish(True), lambda: nn.GroupNorm(2, 16), lambda: nn.ELU(inplace=True)),
    "threshold": sequential(lambda: nn.Threshold(0.1, 0.0, True), lambda: nn.ReLU6(True)),
    "eval": lambda: sequential(lambda: nn.BatchNorm2d(16), lambda: LR(0.2, True), lambda: nn.Dropout(0.3))().eval(),
}
CHANGES = (_channels, _view, _view_of_written, _sum, _noise, _drawn_into, _slice, _promoted, _normalised)
CRITICS |= {change.__name__.strip("_"): partial(Written, change) for change in CHANGES}


@pytest.mark.filterwarnings("ignore:the critic has batch norm")
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CRITICS)
def test_changes_in_place_are_planned(name: str, order: torch.memory_format) -> None:
    if name == "view" and order == torch.channels_last:
        pytest.skip("stock refuses the view")
    torch.manual_seed(0)
    net = CRITICS[name]()
    net = net.to(memory_format=order)  # type: ignore[call-overload]
    other = copy.deepcopy(net)
    real, fake = (torch.randn(6, 3, 16, 16).to(memory_format=order) for _ in range(2))
    alpha = torch.rand(6, 1, 1, 1)
    for _ in range(2):
        results = []
        for critic, ours in ((net, True), (other, False)):
            torch.manual_seed(1)
            critic.zero_grad()
            if ours:
                loss = gankern.gradient_penalty(critic, real, fake, alpha=alpha)
            else:
                x = (alpha * real + (1 - alpha) * fake).requires_grad_()
                (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
                loss = 10 * (grad.flatten(1).norm(2, dim=1) - 1).square().mean()
            loss.backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in critic.parameters()]
            results.append((loss, torch.cat([g.flatten() for g in grads]), torch.get_rng_state(), *critic.buffers()))
        (loss, grad, state, *buffers), (want, expected, after, *others) = results
        assert torch.equal(state, after)
        torch.testing.assert_close([loss, *buffers], [want, *others], rtol=1e-5, atol=1e-5)
        assert (grad - expected).norm() <= 1e-5 * expected.norm()
    plans = known_plans(net)
    assert plans is not None
    # Torch lays what comes before its random slopes otherwise than its fake does.
    refused = name == "random slopes" and order == torch.channels_last
    assert (plans.made, plans.hits) == (1, 0 if refused else 1), plans


def test_images_that_a_critic_changes_are_changed() -> None:
    class Net(Written):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x.clamp_(-1, 1)
                x.view(-1).mul_(2)
            return super().forward(x)

    net = Net(_channels)
    other, real = copy.deepcopy(net), torch.randn(6, 3, 16, 16)
    mine = real.clone()
    for _ in range(2):
        loss = gankern.penalties.r1(net, mine)
        x = real.detach().requires_grad_()
        (grad,) = torch.autograd.grad(other(x).sum(), x)
        torch.testing.assert_close(loss, 5 * grad.square().sum() / 6, rtol=1e-5, atol=1e-6)
        assert torch.equal(mine, real)
    plans = known_plans(net)
    assert plans is not None
    assert plans.made == 1


@pytest.mark.parametrize(
    ("change", "forgotten"),
    [
        (lambda h: h.tanh_(), 1),
        (lambda h: h.tanh_().flatten(1).add_(1), 2),
        (lambda h: h.add_(torch.ones(3, dtype=torch.float64)), 0),
        (lambda h: h[:, ::2].tanh_(), 0),
        (lambda h: (h.tanh_(), h.view(-1))[1], 1),
        (lambda h: (h.view(-1), h.tanh_())[0], 0),
    ],
    ids=["alone", "viewed", "of another type", "with gaps", "viewed later", "viewed before"],
)
def test_writes_that_are_forgotten(change: Callable[[Tensor], Tensor], forgotten: int) -> None:
    """The graph computes the same without them, and with them again."""
    x = torch.randn(2, 3)
    traced = make_fx(lambda x: change(x * 2).clone(), tracing_mode="fake")(x)
    found = in_place.forget(traced.graph)
    assert len(found) == forgotten
    for _ in range(2):
        traced.recompile()
        torch.testing.assert_close(traced(x), change(x * 2), rtol=0, atol=0)
        in_place.put_back(traced.graph, found)


@pytest.mark.filterwarnings("ignore:the critic has batch norm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_are_stocks_where_torch_lays_images_otherwise_than_its_fakes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.LogSigmoid(), nn.Conv2d(8, 8, 1), nn.AlphaDropout(0.3))
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 1)).to(dtype)
    x = torch.randn(4, 3, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
    stock = copy.deepcopy(net)
    for seed in range(3):
        torch.manual_seed(seed)
        loss = gankern.penalties.r1(net, x)
        torch.manual_seed(seed)
        with planning(False):
            want = gankern.penalties.r1(stock, x)
        torch.testing.assert_close(loss, want)
