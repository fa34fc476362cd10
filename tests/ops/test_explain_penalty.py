"""What `gankern.explain` tells of a penalty's critic."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from critics import Residual, batch, plain
from torch import Tensor, nn

import gankern
from gankern import penalties
from gankern.compiler import planning


def explained(critic: Callable[..., Tensor], *inputs: Any, **options: Any) -> Any:
    real, fake, _ = batch(dtype=torch.float32)
    return gankern.explain(gankern.gradient_penalty, critic, real, fake, *inputs, **options)


def test_conv_critic_is_taken_whole() -> None:
    found = explained(plain())
    assert found.chosen == "cpu"
    assert found.reason is None
    assert found.taken == {"Conv2d": 3, "LeakyReLU": 2}
    assert found.stock == {}
    assert found.linear == {"Flatten": 1}
    assert "Conv2d 3, LeakyReLU 2" in str(found)
    assert "stock autograd: nothing" in str(found)


def test_smooth_activations_are_stock() -> None:
    found = explained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Identity(), nn.GELU(), nn.Tanh()))
    assert (found.taken, found.stock, found.linear) == ({"Conv2d": 1}, {"Tanh": 2, "GELU": 1}, {"Identity": 1})


def hooked() -> nn.Module:
    critic = plain()
    critic[2].register_forward_hook(lambda module, args, output: None)
    return critic


def replaced() -> nn.Module:
    critic = plain()
    critic[1].forward = torch.tanh  # type: ignore[method-assign]
    return critic


def with_plain_weight() -> nn.Module:
    critic = plain()
    weight = critic[0].weight.detach()
    del critic[0].weight
    critic[0].weight = weight
    return critic


@pytest.mark.parametrize(
    ("critic", "options", "reason"),
    [
        (Residual, {}, r"the critic \(Residual\) is of no class that gankern's layers know"),
        (lambda: nn.Sequential(plain(), Residual()), {}, r"1 \(Residual\) is of no class"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same")), {}, r"0 \(Conv2d\): padding='same'"),
        (lambda: nn.Sequential(nn.LeakyReLU(-0.5)), {}, r"negative_slope=-0.5"),
        (lambda: nn.Sequential(nn.Sequential(nn.Dropout())), {}, r"0.0 \(Dropout\): it draws"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3)), {}, r"BatchNorm2d\) is of no class"),
        (lambda: nn.Sequential(nn.ReLU(True), nn.Conv2d(3, 1, 1)), {}, r"changes the points in place"),
        (hooked, {}, r"2 \(Conv2d\) has a hook"),
        (replaced, {}, r"1 \(LeakyReLU\) has a method that was replaced"),
        (with_plain_weight, {}, r"weight is not a plain parameter"),
        (nn.Sequential, {}, "no layers"),
        (lambda: plain().double(), {}, "of another device or type"),
        (plain, {"create_graph": True}, "only a module's own call"),
        (plain, {"params": [nn.Parameter(torch.ones(1))]}, "only a module's own call"),
        (lambda: lambda x: x.sum(), {"params": [nn.Parameter(torch.ones(1))]}, "only a module's own call"),
    ],
)
def test_the_reason_is_told(critic: Callable[[], Any], options: dict[str, Any], reason: str) -> None:
    found = explained(critic(), **options)
    assert re.search(reason, found.reason), found.reason
    assert found.taken == found.stock == {}
    assert found.reason in str(found)


def test_the_moment_is_told() -> None:
    with torch.autograd.graph.save_on_cpu():
        assert explained(plain()).reason == "hooks on saved tensors"
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        assert explained(plain()).reason == "anomaly detection"
    half = torch.randn(2, 3, 8, 8).half()
    assert "no kernels for torch.float16" in gankern.explain(penalties.r1, plain().half(), half).reason
    with torch.autocast("cpu"):
        assert explained(plain()).reason is None
        assert "autocast" in explained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))).reason
    with torch.device("cpu"):
        assert explained(plain()).reason is None


def test_calls_without_plans_are_told() -> None:
    assert explained(Residual(), create_graph=True).plan == "none with create_graph"
    assert explained(Residual()).plan == "switched off"
    with planning(True):
        assert explained(Residual()).plan is None
        with gankern.backend("reference"):
            assert "reference" in explained(Residual()).plan


def test_nothing_runs() -> None:
    class Critic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the critic runs")

    labels, (real, fake, _) = torch.arange(4), batch(dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    before = torch.get_rng_state(), generator.get_state()
    explain, params = gankern.explain, [nn.Parameter(torch.ones(1))]
    assert explain("gradient_penalty", Critic(), real, fake, labels, generator=generator).reason
    assert explain("gradient_penalty", lambda x: Critic()(x) * labels, real, fake, params=params).reason
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(generator.get_state(), before[1])


def test_the_family() -> None:
    real, fake, _ = batch(dtype=torch.float32)
    for function, points in (
        (penalties.r1, (real,)),
        (penalties.r2, (fake,)),
        (penalties.dragan, (real,)),
        (penalties.zero_centered, (real, fake)),
    ):
        found = gankern.explain(function, plain(), *points, weight=3.0)
        assert found.taken == {"Conv2d": 3, "LeakyReLU": 2}
        assert gankern.explain(function.__name__, Residual(), *points).reason
    assert "not fused: call gankern.fuse" in str(gankern.explain(gankern.fuse, plain()))
    with pytest.raises(ValueError, match=r"op must be one of .*, fuse, .*got 'unfuse'"):
        gankern.explain(gankern.unfuse, plain())


def test_frozen_critic_one_sample_of_two_dtypes_and_no_grad() -> None:
    critic = plain().requires_grad_(False).double()
    one = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert gankern.explain(gankern.gradient_penalty, critic, real=one, fake=one.double()).taken["Conv2d"] == 3


def test_without_a_critic_it_is_as_for_any_op() -> None:
    assert gankern.explain("gradient_penalty").chosen == "cpu"
    found = gankern.explain(gankern.gradient_penalty, torch.randn(2, 3))
    assert found.chosen == "cpu"
    assert not hasattr(found, "taken")


def test_bad_points_are_named() -> None:
    with pytest.raises(TypeError, match="fake"):
        gankern.explain(gankern.gradient_penalty, plain(), torch.randn(2, 3, 8, 8), 3)
    with pytest.raises(ValueError, match="fake"):
        gankern.explain(gankern.gradient_penalty, plain(), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 9, 8))
    with pytest.raises(ValueError, match="params"):
        gankern.explain(gankern.gradient_penalty, plain(), *torch.randn(2, 2, 3, 8, 8), params=iter(()))
