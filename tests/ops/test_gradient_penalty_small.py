"""Small penalties, which stock autograd computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from critics import CRITICS, Residual, batch, both, gradients, plain
from torch import Tensor, nn

import gankern
from gankern import gradient_penalty, penalties
from gankern.ops.critic_layers import Chain
from gankern.ops.gradient_penalty import reference, small

pytestmark = [pytest.mark.by_size, pytest.mark.filterwarnings("ignore:the critic has batch norm")]


@pytest.fixture
def stock_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("gankern's layers run")

    monkeypatch.setattr(Chain, "run", refuse)


def mlp(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def runs_layers(critic: Any, points: Tensor, **options: Any) -> bool:
    """Whether gankern's layers run, told by the graph."""
    return "_Penalty" in str(gradient_penalty(critic, points, points, **options).grad_fn)


@pytest.mark.parametrize("name", CRITICS)
def test_gradients_are_stocks(name: str, monkeypatch: pytest.MonkeyPatch, stock_only: None) -> None:
    monkeypatch.setattr(small, "is_small", lambda *args: True)
    ours, stock = both(CRITICS[name])
    real, fake, alpha = batch()
    for _ in range(2):
        got = gradient_penalty(ours, real, fake, alpha=alpha, weight=7.0, target=0.3)
        want = reference.gradient_penalty(stock, real, fake, alpha=alpha, weight=7.0, target=0.3)
        torch.testing.assert_close(got, want)
        for g, w in zip(gradients(ours, got), gradients(stock, want), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


def test_points_and_inputs_get_gradients(stock_only: None) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor, factor: Tensor, *, extra: dict[str, Tensor]) -> Tensor:
            return self.inner(x * factor) * extra["mask"]

    torch.manual_seed(1)
    critic = Scaled().double()
    found = []
    for function in (gradient_penalty, reference.gradient_penalty):
        torch.manual_seed(2)
        real, fake, factor, mask = (torch.randn(5, 2).double().requires_grad_() for _ in range(4))
        alpha = torch.rand(5).double()
        if function is gradient_penalty:
            loss = function(critic, real, fake, factor, alpha=alpha, extra={"mask": mask})
        else:
            loss = function(lambda x, f=factor, m=mask: critic(x, f, extra={"mask": m}), real, fake, alpha=alpha)
        loss.backward()
        found.append([t.grad for t in (real, fake, factor, mask)])
    for g, w in zip(*found, strict=True):
        torch.testing.assert_close(g, w)


def test_gradients_follow_the_losss_own(stock_only: None) -> None:
    ours, stock = both(mlp)
    real, fake = torch.randn(2, 6, 2, dtype=torch.float64).unbind()
    alpha = torch.rand(6, dtype=torch.float64)
    got = gradients(ours, -3 * gradient_penalty(ours, real, fake, alpha=alpha))
    want = gradients(stock, -3 * reference.gradient_penalty(stock, real, fake, alpha=alpha))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_points_of_the_caller_are_left_alone(stock_only: None) -> None:
    real = torch.randn(4, 2)
    penalties.r1(mlp(), real).backward()
    assert not real.requires_grad
    assert real.grad is None


def test_errors_name_the_critic() -> None:
    points = torch.randn(4, 2)
    critic = mlp()
    critic.forward = lambda x: [x]
    with pytest.raises(TypeError, match="critic must return a Tensor; got list"):
        gradient_penalty(critic, points, points)
    critic.forward = lambda x: critic[0](torch.ones(4, 2)).sum(1)
    with pytest.raises(ValueError, match="critic must depend on its input"):
        gradient_penalty(critic, points, points)


def test_choice() -> None:
    points, images = torch.randn(4, 2), torch.randn(4, 3, 8, 8)
    assert not runs_layers(mlp(), points)
    assert not runs_layers(Residual(), images)
    assert runs_layers(plain(), images), "strided convolutions"
    assert runs_layers(mlp(512), torch.randn(256, 2))
    assert not runs_layers(mlp(512), torch.randn(256, 2), params=list(mlp().parameters()))
    assert runs_layers(mlp().bfloat16(), points.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert runs_layers(plain(), images), "torch's second derivatives in bfloat16 are wrong"
    for name in ("cpu", "reference"):
        with gankern.backend(name):
            assert runs_layers(mlp(), points), name


def test_explain_tells_the_choice() -> None:
    points = torch.randn(4, 2)
    found = gankern.explain(gradient_penalty, mlp(), points, points)
    assert "small" in found.reason
    assert "small" in str(found)
    found = gankern.explain(gradient_penalty, plain(), *torch.randn(2, 4, 3, 8, 8))
    assert found.reason is None
    assert "small" not in str(found)


def test_without_trainable_parameters() -> None:
    critic = mlp().requires_grad_(False)
    assert not gradient_penalty(critic, *torch.randn(2, 4, 2)).requires_grad
    with torch.no_grad():
        assert not gradient_penalty(mlp(), *torch.randn(2, 4, 2)).requires_grad
