"""Planned steps on a GPU: CUDA graphs between the calls of optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gankern
from gankern.compiler import choice, planning
from tests.compiler.test_step import Gan, conv, mlp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:the critic has batch norm"),
]


def on_gpu(critic: Callable[[], nn.Module]) -> Gan:
    gan = Gan(critic)
    gan.critic.cuda(), gan.generator.cuda()
    gan.critic_optimizer = torch.optim.Adam(gan.critic.parameters(), lr=1e-3, eps=1e-3)
    gan.generator_optimizer = torch.optim.Adam(gan.generator.parameters(), lr=1e-3, eps=1e-3)
    return gan


def near(got: Any, want: Any) -> None:
    """cuBLAS may sum up in another order in a graph."""
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    elif isinstance(want, dict):
        for key in want:
            near(got[key], want[key])
    elif isinstance(want, list | tuple):
        for g, w in zip(got, want, strict=True):
            near(g, w)
    else:
        assert got == want


@pytest.mark.parametrize("method", ["wgan_gp", "own_penalty", "generate", "dcgan"])
@pytest.mark.parametrize(
    "critic",
    [lambda: mlp(nn.Dropout(0.5)), lambda: conv(nn.BatchNorm2d(4)), lambda: mlp(nn.LayerNorm(8))],
    ids=["dropout", "batch", "layer"],
)
def test_steps(method: str, critic: Callable[[], nn.Module]) -> None:
    plain, planned = on_gpu(critic), on_gpu(critic)
    step: Any = gankern.step(getattr(Gan, method))
    results: list[Any] = []
    for call in range(10):
        if call == 6:
            for gan in (plain, planned):
                gan.critic_optimizer.param_groups[0]["lr"] = 1e-4
        if call == 8:
            for gan in (plain, planned):
                weight = next(gan.critic.parameters())
                weight.data = weight.data.clone()
        x = torch.randn(6, 4, dtype=torch.float64, device="cuda")
        torch.manual_seed(call)
        with planning(False):
            want = getattr(plain, method)(x)
        after = torch.cuda.get_rng_state()
        torch.manual_seed(call)
        with planning(True), choice.everywhere():
            got = step(planned, x)
        assert torch.equal(torch.cuda.get_rng_state(), after)
        near(got, want)
        near(planned.state(), plain.state())
        results.append((got, want))
    for got, want in results:
        near(got, want)
    segments = step._plans.plans[0]._segments
    assert any(s.graph is not None and s.graph.is_captured for s in segments), [
        s.graph and s.graph.reason for s in segments
    ]
    assert step.explain().chosen == "plan"
