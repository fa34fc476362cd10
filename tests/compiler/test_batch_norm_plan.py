"""Batch norm in planned penalties: gankern's three passes where it normalises by the batch, else torch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate
from torch import Tensor, nn

from gankern import backend, gradient_penalty
from gankern.compiler import norms
from gankern.compiler.cache import Plans
from gankern.compiler.refusal import Refused
from tests.compiler.test_penalty_plan import GP, R1, agrees, planned, stock

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}


def counts(plans: Plans, ops: Any = norms.BATCH_NORM) -> tuple[int, int, int]:
    """How often each pass is in the last plan."""
    targets = [getattr(node.target, "func", node.target) for node in plans.plans[0].graph.graph.nodes]
    first, second, third = (targets.count(op) + targets.count(norms.IMPLEMENTATIONS[op]) for op in ops)
    return first, second, third


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def trained(critic: nn.Module) -> nn.Module:
    """In float64, with other parameters and statistics than new ones have."""
    for m in critic.double().modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t in (m.weight, m.bias, m.running_mean, m.running_var):
                if t is not None:
                    nn.init.uniform_(t, 0.5, 2.0)
    return critic


class Head(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return (h.sigmoid() * h).flatten(1).sum(1)


class Mix(nn.Module):
    """Channels mixed at each place, so that gradients of the norm's input and output are no constants."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(x.movedim(1, -1))).movedim(-1, 1).contiguous()


def critic_of(*norms_: nn.Module, channels: int = 3) -> nn.Module:
    return trained(nn.Sequential(Mix(channels), *norms_, Head()))


@pytest.mark.parametrize("options", [GP, R1], ids=["gp", "r1"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(
    "shape",
    [
        *((6, 3), (5, 17), (4, 1), (7, 64), (70, 3), (2, 3, 9), (1, 17, 11), (4, 64, 1, 1), (3, 17, 5, 7)),
        *((1, 3, 5, 7), (40, 1, 3, 3), (2, 20, 4, 5), (2, 3, 2, 3, 2)),
    ],
    ids=str,
)
def test_shapes(shape: tuple[int, ...], affine: bool, options: Any) -> None:
    norm = NORMS[max(len(shape) - 1, 1)](shape[1], eps=0.8, momentum=0.3, affine=affine)
    plans = agrees(critic_of(norm, channels=shape[1]), doubles(*shape), options=options)
    assert counts(plans) == (1, 2, 1)


@pytest.mark.parametrize("channels", [1, 3, 17, 64])
def test_channels_last(channels: int) -> None:
    """Between convolutions, which leave images so."""
    layers = [nn.Conv2d(2, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.LeakyReLU(0.2, True)]
    layers += [nn.Conv2d(channels, 4, 3, 2, 1), nn.ReLU(), nn.BatchNorm2d(4, 0.8), nn.Flatten(), nn.Linear(16, 1)]
    critic = trained(nn.Sequential(*layers))
    x = doubles(5, 2, 8, 8)
    plans = agrees(critic, x)
    # Nothing after the last one has a second derivative.
    assert counts(plans) == (2, 3, 2)
    plans = agrees(critic.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    assert counts(plans) == (2, 3, 2)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_no_more_is_turned_than_without_it(last: bool) -> None:
    """In float32 the convolutions are gankern's, in channels_last, and the norm takes what they leave."""

    def turns(*middle: nn.Module) -> int:
        torch.manual_seed(0)
        critic = nn.Sequential(nn.Conv2d(2, 16, 3, 1, 1), *middle, nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 8))
        x = torch.randn(4, 2, 8, 8)
        if last:
            critic, x = (t.to(memory_format=torch.channels_last) for t in (critic, x))
        plans = Plans()
        planned(plans, critic, x, (), list(critic.parameters()), GP)
        nodes = plans.plans[0].graph.graph.nodes
        return sum(getattr(node.target, "__name__", "") == "turned" for node in nodes)

    assert turns(nn.BatchNorm2d(16)) <= turns()


@pytest.mark.parametrize(
    ("norm", "ops"),
    [
        (nn.BatchNorm2d(4), norms.BATCH_NORM),
        (nn.GroupNorm(2, 4), norms.GROUP_NORM),
        (nn.LayerNorm([4, 4, 4]), norms.LAYER_NORM),
    ],
)
def test_no_zeros_go_through_a_norm(norm: nn.Module, ops: Any) -> None:
    """Those that autograd has for the second derivative of the activation."""
    layers = [nn.Conv2d(2, 4, 3, 2, 1), norm, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 1)]
    plans = agrees(trained(nn.Sequential(*layers)), doubles(3, 2, 8, 8))
    assert counts(plans, ops) == (1, 1, 1)


MAKES: dict[str, Callable[[], nn.Module]] = {
    "frozen affine": lambda: nn.BatchNorm2d(3).requires_grad_(False),
    "no statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "no statistics, eval": lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(),
    "momentum 0": lambda: nn.BatchNorm2d(3, momentum=0.0),
    "momentum 1": lambda: nn.BatchNorm2d(3, momentum=1.0),
    "momentum above 1": lambda: nn.BatchNorm2d(3, momentum=1.5),
    "two in a row": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, 0.1)),
    "in place after": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(0.2, True)),
    "one in eval": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()),
    "the first in eval": lambda: nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Tanh(), nn.BatchNorm2d(3)),
}
NONE_OF_OURS = {
    "eval": lambda: nn.BatchNorm2d(3).eval(),
    "momentum None, eval": lambda: nn.BatchNorm2d(3, 1e-2, None).eval(),
}


@pytest.mark.parametrize("name", [*MAKES, *NONE_OF_OURS])
def test_kinds(name: str) -> None:
    critic = critic_of((MAKES | NONE_OF_OURS)[name]())
    plans = agrees(critic, doubles(4, 3, 5, 7))
    # The plan is for other values too.
    agrees(critic, doubles(4, 3, 5, 7), plans=plans)
    assert plans.made == 1 and plans.hits == 1
    first, _, third = counts(plans)
    assert first == third == {"two in a row": 2}.get(name, int(name in MAKES))


def test_points_that_want_a_gradient() -> None:
    critic, x = critic_of(nn.BatchNorm2d(3), nn.Tanh(), nn.BatchNorm2d(3)), doubles(4, 3, 5, 7)
    call = {"critic": critic, "x": x.clone().requires_grad_(), "args": (), "kwargs": {}}
    plans, other = Plans(), copy.deepcopy(critic)
    loss, found = plans.run(call, True, True, GP)
    points = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(other(points).sum(), points, create_graph=True)
    want = 10 * (grad.flatten(1).norm(2, dim=1) - 1).square().mean()
    (of_points,) = (g for t, g in found if t is None)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(of_points, torch.autograd.grad(want, points)[0], rtol=1e-9, atol=1e-11)
    assert counts(plans)[0] == 2


def test_statistics_are_written_once_and_shared_ones_twice() -> None:
    """By two calls of one module, and by two modules with the same buffers."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.other, self.mix = nn.BatchNorm2d(3), nn.BatchNorm2d(3), Mix(3)
            self.other.running_mean, self.other.running_var = self.norm.running_mean, self.norm.running_var

        def forward(self, x: Tensor) -> Tensor:
            return Head()(self.other(self.mix(self.norm(self.mix(self.norm(x))))))

    critic = trained(Twice())
    critic.other.running_mean, critic.other.running_var = critic.norm.running_mean, critic.norm.running_var
    plans = agrees(critic, doubles(4, 3, 5, 7))
    agrees(critic, doubles(4, 3, 5, 7), plans=plans)
    assert counts(plans)[0] == 3 and critic.norm.num_batches_tracked == 4 and critic.other.num_batches_tracked == 2


def test_a_graph_made_before_the_penalty_can_still_be_run_backward() -> None:
    """Torch does not count the writes of statistics, which the graph has saved."""
    critic = critic_of(nn.BatchNorm2d(3))
    x = doubles(4, 3, 5, 7)
    scores, plans, version = critic(x), Plans(), critic[1].running_mean._version
    planned(plans, critic, x, (), list(critic.parameters()), GP)
    assert counts(plans)[0] == 1 and critic[1].running_mean._version == version
    scores.sum().backward()


def test_a_graph_made_before_a_refused_replay_can_still_be_run_backward() -> None:
    critic = critic_of(nn.BatchNorm2d(3))
    x = doubles(4, 3, 5, 7)
    scores, before = critic(x), copy.deepcopy(critic.state_dict())
    with pytest.raises(Refused, match="finite"):
        planned(Plans(), critic, x * torch.inf, (), list(critic.parameters()), GP)
    for name, value in critic.state_dict().items():
        assert torch.equal(value, before[name])
    scores.sum().backward()


def test_modes_change_between_calls() -> None:
    critic, plans = critic_of(nn.BatchNorm2d(3), nn.Tanh(), nn.BatchNorm2d(3)), Plans()
    x = doubles(4, 3, 5, 7)
    for _ in range(2):
        agrees(critic.train(), x, plans=plans)
        agrees(critic.eval(), x, plans=plans)
        critic.train()
        critic[3].eval()
        agrees(critic, x, plans=plans)
    assert plans.made == 3 and plans.hits == 3


def test_statistics_keep_the_bits_of_stock() -> None:
    """But for the last one: as often and as rounded, in float32 and over values far from zero."""
    for shape in ((6, 5), (3, 5, 4, 4)):
        critic = nn.Sequential(NORMS[max(len(shape) - 1, 1)](5, momentum=0.3), Head())
        other = copy.deepcopy(critic)
        x = torch.randn(shape) + 100
        planned(plans := Plans(), critic, x, (), list(critic.parameters()), GP)
        stock(other, x, (), list(other.parameters()), GP)
        assert counts(plans)[0] == 1
        for b, c in zip(critic.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(b, c, rtol=2e-7, atol=0)


@pytest.mark.filterwarnings("ignore:the critic has batch norm")
def test_one_value_of_a_channel_is_stocks_error() -> None:
    critic = critic_of(nn.BatchNorm1d(3))
    before = copy.deepcopy(critic.state_dict())
    x = doubles(1, 3)
    with pytest.raises(Refused):
        planned(Plans(), critic, x, (), list(critic.parameters()), GP)
    for name, value in critic.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        gradient_penalty(critic, x, x)


@pytest.mark.filterwarnings("ignore:the critic has batch norm")
def test_averages_over_all_batches_are_stocks() -> None:
    """momentum=None: the module reads how many there were."""
    x = torch.randn(4, 3, 5, 7)
    critics = [nn.Sequential(nn.BatchNorm2d(3, momentum=None), Head()) for _ in range(2)]
    for _ in range(2):
        loss = gradient_penalty(critics[0], x, x)
        torch.testing.assert_close(loss.detach(), stock(critics[1], x, (), list(critics[1].parameters()), GP)[0])
    for b, c in zip(critics[0].buffers(), critics[1].buffers(), strict=True):
        torch.testing.assert_close(b, c)


class Affine(nn.Module):
    """A weight that depends on the images."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, x.mean((0, 2, 3)).exp(), x.sum((0, 2, 3)), True)


class SharedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm2d(3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.norm.weight.sum() + self.norm.bias.square().sum()


@pytest.mark.parametrize(("make", "ours"), [(Affine, 0), (SharedWeight, 1)])
def test_functions(make: Callable[[], nn.Module], ours: int) -> None:
    plans = agrees(critic_of(make()), doubles(4, 3, 5, 7))
    assert counts(plans)[0] == ours


@pytest.mark.parametrize("x", [doubles(4, 3, 5, 7, 2)[..., 0], doubles(5, 4, 3, 7).permute(1, 2, 0, 3)], ids=["a", "b"])
def test_images_that_are_not_dense(x: Tensor) -> None:
    plans = agrees(trained(nn.Sequential(nn.BatchNorm2d(3), Head())), x)
    assert counts(plans)[0] == 0


def test_volumes_with_the_channels_last_are_left_to_torch() -> None:
    x = doubles(2, 3, 2, 3, 2).to(memory_format=torch.channels_last_3d)
    plans = agrees(trained(nn.Sequential(nn.BatchNorm3d(3), Head())), x)
    assert counts(plans)[0] == 0


def test_half_types_are_left_to_torch() -> None:
    critic = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    x = torch.randn(6, 4)
    for autocast in (True, False):
        ours, other, plans = copy.deepcopy(critic), copy.deepcopy(critic), Plans()
        points = x if autocast else x.bfloat16()
        if not autocast:
            ours, other = ours.bfloat16(), other.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            want = stock(other, points, (), list(other.parameters()), GP)
            got = planned(plans, ours, points, (), list(ours.parameters()), GP)
        assert counts(plans)[0] == 0
        g, w = (torch.cat([t.flatten() for t in tensors if t is not None]).float() for tensors in (got, want))
        assert (g - w).norm() <= 0.05 * w.norm()


def test_sync_batch_norm_alone_is_a_batch_norm() -> None:
    agrees(critic_of(nn.SyncBatchNorm(3)), doubles(4, 3, 5, 7))


def test_the_reference_takes_the_same_plans() -> None:
    with backend("reference"):
        plans = agrees(critic_of(nn.BatchNorm2d(3)), doubles(4, 3, 5, 7))
    assert counts(plans) == (1, 2, 1)


def test_float32_is_as_accurate_as_stock() -> None:
    exact = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16, 0.8), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(16, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Softplus(), nn.Flatten()),
        *(nn.Linear(128, 19), nn.BatchNorm1d(19), nn.Tanh(), nn.Linear(19, 1)),
    ).double()
    x = doubles(16, 3, 8, 8)

    def results(run: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        critic = copy.deepcopy(exact).to(dtype)
        loss, *grads = run(critic, x.to(dtype), (), list(critic.parameters()), GP)
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(critic.parameters(), grads, strict=True)]
        return [loss, torch.cat([g.flatten() for g in found])]

    plans = Plans()
    got = results(lambda *args: planned(plans, *args), torch.float32)
    assert counts(plans)[0] == 3
    for ours, theirs, best in zip(got, results(stock, torch.float32), results(stock, torch.float64), strict=True):
        assert_as_accurate(ours, theirs, best)
