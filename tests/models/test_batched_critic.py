"""Real and fake images through the critic in one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import gankern
from gankern import models, train
from gankern.models import gan as gans
from gankern.models.coupling import couples_samples

SMALL = {"image_size": 8, "width": 4, "latent_dim": 4, "batch_size": 4}


@contextmanager
def calls(module: nn.Module) -> Iterator[list[int]]:
    """Batch sizes of a module's calls; by a global hook, since one of its own would count as unknown behaviour."""
    sizes: list[int] = []
    handle = register_module_forward_hook(lambda m, args, out: sizes.append(len(args[0])) if m is module else None)
    try:
        yield sizes
    finally:
        handle.remove()


def build(name: str, ops: str = "gankern", **overrides: object) -> models.GAN:
    torch.manual_seed(3)
    return models.build(name, ops=ops, **(SMALL | overrides))


def result(gan: models.GAN, batched: bool | None, real: Tensor, fake: Tensor) -> tuple[Tensor, list[Tensor], list[int]]:
    gan.batched_critic = batched
    gan.critic.zero_grad()
    torch.manual_seed(1)
    with calls(gan.critic) as sizes:
        loss = gan.critic_loss(real, fake)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in gan.critic.parameters()], sizes


@pytest.mark.parametrize("name", sorted(models.MODELS))
@pytest.mark.parametrize("ops", ["gankern", "stock"])
@pytest.mark.parametrize("fakes", [5, 3])
def test_one_call_gives_what_two_give(name: str, ops: str, fakes: int) -> None:
    gan = build(name, ops, image_size=16)
    gan.critic.eval()  # no batch norm over the batch
    real, fake = torch.randn(5, 1, 16, 16), torch.randn(fakes, 1, 16, 16)
    if name == "wgan-gp":
        fake = torch.randn_like(real)
    two, one = result(gan, False, real, fake), result(gan, True, real, fake)
    assert one[2][0] == len(real) + len(fake)
    assert two[2][:2] == [len(real), len(fake)]
    assert len(two[2]) == len(one[2]) + 1
    torch.testing.assert_close(one[0], two[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dcgan", "wgan"])
def test_batch_norm_in_training_mode_means_two_calls(name: str) -> None:
    real, fake = torch.randn(2, 5, 1, 16, 16)
    gan = build(name, image_size=16)
    assert gan.critic_couples_samples
    assert result(gan, True, real, fake)[2] == [5, 5]


def test_automatic_goes_by_the_size_and_the_subclass_may_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = torch.randn(2, 5, 1, 8, 8)
    gan = build("wgan-gp", "stock")
    assert result(gan, None, real, fake)[2] == [10, 5]
    monkeypatch.setattr(gans, "BATCHED_CRITIC_IMAGES", len(real) - 1)
    assert result(gan, None, real, fake)[2] == [5, 5, 5]
    monkeypatch.setattr(models.WGANGP, "critic_couples_samples", True)
    assert result(gan, True, real, fake)[2] == [5, 5, 5]


def test_several_scores_an_image_stay_apart() -> None:
    gan = build("wgan-gp")
    gan.critic = nn.Sequential(nn.Conv2d(1, 2, 5), nn.Flatten(0))
    gan.batched_critic = True
    real, fake = torch.randn(3, 1, 8, 8), torch.randn(2, 1, 8, 8)
    for scores, images in zip(gan.critic_scores(real, fake), (real, fake), strict=True):
        torch.testing.assert_close(scores, gan.critic(images))


class Shifted(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return input - input.mean(0)


def hooked() -> nn.Module:
    module = nn.ReLU()
    module.register_forward_hook(lambda m, args, out: out - out.mean(0))
    return module


COUPLED = {
    "batch norm": lambda: nn.BatchNorm2d(2),
    "batch norm without running statistics": lambda: nn.BatchNorm2d(2, track_running_stats=False).eval(),
    "dropout": lambda: nn.Dropout(),
    "minibatch discrimination": lambda: gankern.nn.MinibatchDiscrimination(4, 2, 2),
    "minibatch standard deviation": lambda: gankern.nn.MinibatchStdDev(),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(2, 2)),
    "a subclass": Shifted,
    "a hook": hooked,
    "a flattened batch": lambda: nn.Sequential(nn.Flatten(0), nn.Linear(8, 1)),
    "softmax": lambda: nn.Softmax(0),
}
APART = {
    "batch norm": lambda: nn.BatchNorm2d(2).eval(),
    "dropout": lambda: nn.Dropout().eval(),
    "flatten": lambda: nn.Flatten(),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2), nn.GELU()),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled(name: str) -> None:
    assert couples_samples(nn.Sequential(nn.Conv2d(1, 2, 3), COUPLED[name](), nn.Flatten(0)))


@pytest.mark.parametrize("name", APART)
def test_not_coupled(name: str) -> None:
    assert not couples_samples(nn.Sequential(nn.Conv2d(1, 2, 3), APART[name](), nn.Flatten(0)))


def test_fit_sets_it() -> None:
    images = torch.rand(10, 1, 8, 8) * 2 - 1
    for batched in (False, True):
        gan = build("wgan-gp", "stock", n_critic=1)
        with calls(gan.critic) as sizes:
            train.fit(gan, images, steps=1, progress=False, batched_critic=batched)
        assert sizes == ([8, 4] if batched else [4, 4, 4]) + [4]
        assert gan.batched_critic is batched
