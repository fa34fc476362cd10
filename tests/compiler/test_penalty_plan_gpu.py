"""Plans of penalties on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gankern.compiler.cache import Plans
from tests.compiler.test_penalty_plan import GP, Attention, Custom, Modulated, Residual, conv_critic, planned, stock

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.Dropout(0.5), nn.LeakyReLU(), nn.Linear(16, 1)).double()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (conv_critic, (3, 2, 8, 8)),
        (lambda: conv_critic(nn.BatchNorm2d(4)), (3, 2, 8, 8)),
        (lambda: conv_critic(nn.GroupNorm(2, 4)), (3, 2, 8, 8)),
        (lambda: conv_critic(nn.InstanceNorm2d(4, affine=True)), (3, 2, 8, 8)),
        (lambda: conv_critic(nn.LayerNorm([4, 4, 4])), (3, 2, 8, 8)),
        (lambda: Residual().double(), (3, 2, 8, 8)),
        (lambda: Modulated().double(), (3, 2, 8, 8)),
        (lambda: Custom().double(), (5, 4)),
        (lambda: Attention().double(), (3, 6, 4)),
        (lambda: Attention().double(), (3, 128, 4)),
        (dropout, (4, 2, 8, 8)),
    ],
    ids=[
        "conv",
        "batch",
        "group",
        "instance",
        "layer",
        "residual",
        "modulated",
        "custom",
        "attention",
        "blocks",
        "dropout",
    ],
)
def test_a_plan_gives_stocks_values_on_a_gpu(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    critic = make().cuda()
    other, x = copy.deepcopy(critic), torch.randn(shape, dtype=torch.float64, device="cuda")
    plans = Plans()
    for _ in range(2):
        torch.manual_seed(3)
        want = stock(other, x, (), list(other.parameters()), GP)
        after = torch.cuda.get_rng_state()
        torch.manual_seed(3)
        got = planned(plans, critic, x, (), list(critic.parameters()), GP)
        assert torch.equal(torch.cuda.get_rng_state(), after)
        for g, w in zip(got, want, strict=True):
            assert (g is None) == (w is None)
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)
        for b, c in zip(critic.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(b, c, rtol=1e-9, atol=1e-11)


def test_a_plan_is_captured_in_a_cuda_graph() -> None:
    torch.manual_seed(0)
    critic, x = Residual().double().cuda(), torch.randn(3, 2, 8, 8, dtype=torch.float64, device="cuda")
    parameters, plans = list(critic.parameters()), Plans()

    def step() -> list[Any]:
        return planned(plans, critic, x, (), parameters, GP)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    want: list[Tensor | None] = stock(critic, x, (), parameters, GP)
    for g, w in zip(got, want, strict=True):
        if w is not None:
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)
