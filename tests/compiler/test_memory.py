"""Peak memory of steps by plans: at most stock's and the bytes of the parameters, the workspace's idle memory too."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from critics import CRITICS
from gans import AttributeDiscriminator, ResGenerator, pix2pix
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import gankern
from gankern import workspace

pytestmark = pytest.mark.filterwarnings("ignore:the critic has batch norm")

# Calls before the one that counts. Stock's makes the optimizer's state; ours are two by stock, one that makes the
# plans, and one by their programs as they stay.
STOCK, OURS = 1, 4
# What the workspace maps beyond 32 MiB ends with a whole huge page.
_SLACK = 2 << 20


def peak(run: Callable[[], object], calls: int) -> int:
    """Most bytes that a run holds at once, beside what is left of the calls before when it has let that go."""
    for _ in range(calls):
        run()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = least = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        least = min(least, held)
        most = max(most, held - least)
    return most + workspace.used_bytes() + workspace.idle_bytes()


def steps(net: nn.Module, step: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(net.parameters(), 1e-4)

    def run() -> None:
        optimizer.zero_grad()
        step(net).backward()
        optimizer.step()

    return run


def compare(net: nn.Module, ours: Callable[[nn.Module], Tensor], stock: Callable[[nn.Module], Tensor]) -> None:
    parameters = sum(p.numel() * p.element_size() for p in net.parameters())
    workspace.release()
    before = workspace.used_bytes()
    want = peak(steps(copy.deepcopy(net), stock), STOCK) - before
    got = peak(steps(gankern.fuse(net), ours), OURS) - before
    assert got <= want + parameters + _SLACK, (got, want, parameters)


def stock_penalty(critic: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return 5 * grad.square().sum() / len(x)


@pytest.mark.parametrize("name", CRITICS)
def test_critic_steps(name: str) -> None:
    """The scores of real and fake images with the penalty, on images enough that memory is theirs."""
    critic, images = CRITICS[name](), torch.randn(1024, 3, 8, 8)

    def step(penalty: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module], Tensor]:
        return lambda net: net(images).mean() - net(images + 1).mean() + penalty(net, images)

    compare(critic, step(lambda net, x: gankern.penalties.r1(net, x)), step(stock_penalty))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "critic of attributes": (lambda: AttributeDiscriminator(16), (32, 3, 64, 64)),
    "residual": (lambda: ResGenerator(width=32), (128, 5)),
    "pix2pix": (pix2pix, (32, 3, 32, 32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_generator_steps(name: str) -> None:
    make, shape = MODELS[name]
    noise = torch.randn(shape)

    def step(net: nn.Module) -> Tensor:
        return net(noise).square().mean()

    compare(make(), step, step)


def test_a_kept_loss_holds_no_images() -> None:
    net = gankern.fuse(nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten()))
    for _ in range(4):
        images = torch.randn(32, 3, 32, 32)
        loss, held = net(images).mean(), weakref.ref(images)
        loss.backward()
        del images
        assert held() is None
    assert "1 made" in str(gankern.fusion_report(net))
