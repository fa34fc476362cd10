"""torch.compile(backend=backend)."""

from __future__ import annotations

import copy
import importlib.metadata
import logging

import pytest
import torch
from torch import Tensor, nn

from gankern.compiler import choice
from gankern.compiler.dynamo import backend
from tests.compiler.test_fused_plan import NETWORKS, same, step


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["generator", "skips", "deep"])
def test_a_compiled_module_computes_stocks_values(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    stock, x = make().double(), torch.randn(shape, dtype=torch.float64)
    inner = copy.deepcopy(stock)
    ours = torch.compile(inner, backend=backend)
    weight = torch.randn_like(copy.deepcopy(stock)(x))
    with choice.everywhere(), caplog.at_level(logging.INFO, "gankern.compiler"):
        for _ in range(2):
            want = step(stock, x, weight)
            got = step(ours, x, weight)
            same({n.removeprefix("_orig_mod."): v for n, v in got.items()}, want)
    assert not [r for r in caplog.records if "no plan" in r.message]


def test_a_loss_is_compiled() -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS["deep"]
    critic = make().double()
    real, fake = torch.randn(2, *shape, dtype=torch.float64)

    def loss() -> Tensor:
        return critic(fake).mean() - critic(real).mean()

    before = copy.deepcopy(critic.state_dict())
    want = torch.autograd.grad(loss(), list(critic.parameters()))
    critic.load_state_dict(before)
    with choice.everywhere():
        got = torch.autograd.grad(torch.compile(loss, backend=backend)(), list(critic.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_what_has_several_outputs_runs_as_it_is() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.conv(x)
            return h, h.relu()

    net, x = Two(), torch.randn(1, 1, 5, 5)
    torch.testing.assert_close(torch.compile(net, backend=backend)(x), net(x))


def test_torch_knows_it_by_name() -> None:
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="gankern")
    assert entry.load() is backend
