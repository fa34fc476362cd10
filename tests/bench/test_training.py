from __future__ import annotations

import pytest
import torch

from gankern import models
from gankern.bench import training
from gankern.bench.results import OURS, STOCK

SMALL = {"width": 4, "latent_dim": 8, "batch_size": 8, "n_critic": 2}


@pytest.fixture
def images():
    return torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("model", ["dcgan", "wgan", "wgan-gp"])
def test_stock_and_gankern_train_alike(model, images):
    shares = []
    result, gan = training.train_both(model, images, iterations=2, progress=shares.append, **SMALL)
    assert result.status == "ok", result.message
    assert gan.ops == OURS
    assert result.images == 16
    assert len(result.losses[STOCK]) == len(result.losses[OURS]) == training.CHECKED * 3
    assert result.images_per_second(OURS) > 0
    assert result.ratio.p20 <= result.ratio.median <= result.ratio.p80
    assert shares == sorted(shares)


def test_a_different_optimizer_is_wrong_and_has_no_time(images, monkeypatch):
    build = models.build

    def other(*args, ops, **overrides):
        gan = build(*args, ops=ops, **overrides)
        if ops == OURS:
            gan.critic_optimizer.param_groups[0]["lr"] *= 1.5
        return gan

    monkeypatch.setattr(training.models, "build", other)
    result, _ = training.train_both("wgan", images, iterations=2, **SMALL)
    assert result.status == "wrong"
    assert "parameters" in result.message
    assert result.sides == {}
    assert result.ratio is None
