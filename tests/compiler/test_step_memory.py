"""Peak memory of planned steps: at most stock's and the bytes of the parameters, the workspace's idle memory too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from critics import CRITICS
from torch import Tensor, nn

import gankern
from gankern import workspace
from gankern.compiler import choice, planning
from tests.compiler.test_memory import _SLACK, OURS, STOCK, peak, stock_penalty

pytestmark = pytest.mark.filterwarnings("ignore:the critic has batch norm")


def step_of(net: nn.Module, penalty: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    optimizer = torch.optim.Adam(net.parameters(), 1e-4)

    def step(images: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = net(images).mean() - net(images + 1).mean() + penalty(net, images)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("name", CRITICS)
def test_critic_steps(name: str) -> None:
    net, images = CRITICS[name](), torch.randn(1024, 3, 8, 8)
    parameters = sum(p.numel() * p.element_size() for p in net.parameters())
    stock = step_of(copy.deepcopy(net), stock_penalty)
    ours: Any = gankern.step(step_of(net, lambda net, x: gankern.penalties.r1(net, x)))
    workspace.release()
    before = workspace.used_bytes()
    want = peak(lambda: stock(images), STOCK) - before
    with planning(True), choice.everywhere():
        got = peak(lambda: ours(images), OURS) - before
    assert ours.explain().chosen == "plan", str(ours.explain())
    assert got <= want + parameters + _SLACK, (got, want, parameters)
