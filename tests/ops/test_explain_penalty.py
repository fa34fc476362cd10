"""What `gankern.explain` tells of a penalty's critic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from critics import Residual, batch, plain
from torch import Tensor, nn

import gankern


def explained(critic: Callable[[Tensor], Tensor], **options: object):
    real, fake, _ = batch(dtype=torch.float32)
    return gankern.explain(gankern.gradient_penalty, critic, real, fake, **options)


def test_conv_critic_is_taken_whole() -> None:
    found = explained(plain())
    assert found.chosen == "cpu"
    assert found.taken == {"conv2d": 3, "leaky_relu": 2}
    assert found.stock == found.why == {}
    assert found.linear == {"flatten": 1}
    assert "conv2d 3, leaky_relu 2" in str(found)
    assert "stock autograd: nothing" in str(found)


def test_residual_critic_loses_nothing() -> None:
    found = explained(Residual(), weight=3.0)
    assert found.taken == {"conv2d": 2, "layer_norm": 1, "relu": 2, "add": 1, "avg_pool2d": 1, "linear": 1}
    assert found.stock == {}
    assert found.linear == {"mean": 1, "flatten": 1}


def test_unknown_functions_are_stock() -> None:
    first = nn.Conv2d(3, 4, 3)

    def critic(x: Tensor) -> Tensor:
        y = F.gelu(torch.tanh(first(x)))
        return ((y * y).tanh() * 0.5).max(1)[0]

    found = explained(critic, params=first.parameters())
    assert found.taken == {"conv2d": 1}
    assert found.stock == {"tanh": 2, "gelu": 1, "mul": 1, "max": 1}
    assert found.linear == {"mul": 1}
    assert all("no layer" in found.why[name] for name in found.stock)
    assert "gelu 1: gankern has no layer for it" in str(found)


def test_options_that_are_not_taken_are_named() -> None:
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(-0.5), nn.LeakyReLU(0.1), nn.Flatten(0))
    found = explained(critic)
    assert found.taken == {"conv2d": 1, "leaky_relu": 1}
    assert found.stock == {"leaky_relu": 1}
    assert "does not take this call" in found.why["leaky_relu"]
    assert "-0.5" in found.why["leaky_relu"]


def test_string_padding_is_stock() -> None:
    found = explained(nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 1, 3)))
    assert (found.taken, found.stock) == ({"conv2d": 1}, {"conv2d": 1})
    assert "'same'" in found.why["conv2d"]


class Stateful(nn.Module):
    """Everything that a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
            nn.BatchNorm2d(4),
            nn.Dropout(),
            nn.utils.spectral_norm(nn.Conv2d(4, 1, 3)),
        )
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x + torch.rand(())).flatten(1).sum(1)


@pytest.mark.parametrize("form", ["module", "callable"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_touched(form: str, fails: bool) -> None:
    critic = Stateful()
    real, fake, _ = batch(dtype=torch.float32)
    pending = critic(real).sum()
    for p in critic.parameters():
        p.grad = torch.ones_like(p)
    old_weight = critic.net[3].weight
    buffers = list(critic.named_buffers())
    before = {name: b.clone() for name, b in buffers}
    versions = [b._version for _, b in buffers]
    rng, generator = torch.get_rng_state(), torch.Generator().manual_seed(1)
    drawn = generator.get_state()

    def call(x: Tensor) -> Tensor:
        y = critic(x)
        assert critic.calls == 2
        if fails:
            raise KeyError("critic")
        return y

    if form == "module" and fails:
        critic.register_forward_hook(lambda *a: {}["critic"])
    options = {"generator": generator} | ({} if form == "module" else {"params": critic.parameters()})
    run = lambda: gankern.explain("gradient_penalty", critic if form == "module" else call, real, fake, **options)  # noqa: E731
    if fails:
        with pytest.raises(KeyError):
            run()
    else:
        assert run().stock["batch_norm"] == 1

    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(generator.get_state(), drawn)
    assert critic.calls == 1
    assert critic.net[3].weight is old_weight
    after = list(critic.named_buffers())
    assert all(a is b for (_, a), (_, b) in zip(after, buffers, strict=True))
    assert all(torch.equal(b, before[name]) for name, b in after)
    assert [b._version for _, b in after] == versions
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in critic.parameters())
    assert not nn.modules.module._global_forward_pre_hooks
    pending.backward()


def test_frozen_critic_one_sample_of_two_dtypes_and_no_grad() -> None:
    critic = plain().requires_grad_(False).double()
    one = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert gankern.explain(gankern.gradient_penalty, critic, real=one, fake=one.double()).taken["conv2d"] == 3


def test_without_a_critic_it_is_as_for_any_op() -> None:
    assert gankern.explain("gradient_penalty").chosen == "cpu"
    found = gankern.explain(gankern.gradient_penalty, torch.randn(2, 3))
    assert found.chosen == "cpu"
    assert not hasattr(found, "taken")


def test_further_inputs_reach_the_critic() -> None:
    embedding, first = nn.Embedding(10, 4), nn.Conv2d(3, 4, 3)

    def critic(x: Tensor, labels: Tensor, *, scale: float) -> Tensor:
        return scale * (first(x).mean((2, 3)) * embedding(labels)).sum(1)

    real, fake = torch.randn(2, 5, 3, 8, 8)
    params = [*first.parameters(), *embedding.parameters()]
    found = gankern.explain(gankern.gradient_penalty, critic, real, fake, torch.arange(5), scale=2.0, params=params)
    assert found.taken == {"conv2d": 1}
    assert found.chosen == "cpu"


def test_bad_points_are_named() -> None:
    with pytest.raises(TypeError, match="fake"):
        gankern.explain(gankern.gradient_penalty, plain(), torch.randn(2, 3, 8, 8), 3)
    with pytest.raises(ValueError, match="fake"):
        gankern.explain(gankern.gradient_penalty, plain(), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 9, 8))
