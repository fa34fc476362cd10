"""One update of the critic, one of the generator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gankern.models.gan import GAN


def critic_step(gan: GAN, real: Tensor, latent: Tensor) -> Tensor:
    """Update the critic once.

    Parameters
    ----------
    gan : GAN
    real : Tensor
        (N, C, H, W) images in [-1, 1].
    latent : Tensor
        (N, latent_dim, 1, 1), as from ``gan.sample_latent``.

    Returns
    -------
    Tensor
        The loss before the update, a detached scalar.
    """
    with torch.no_grad():
        fake = gan.generator(latent)
    loss = gan.critic_loss(real, fake)
    gan.critic_optimizer.zero_grad()
    loss.backward()
    gan.critic_optimizer.step()
    gan.after_critic_step()
    return loss.detach()


def generator_step(gan: GAN, latent: Tensor) -> Tensor:
    """Update the generator once; the critic passes gradients on but gets none.

    Parameters
    ----------
    gan : GAN
    latent : Tensor
        (N, latent_dim, 1, 1), as from ``gan.sample_latent``.

    Returns
    -------
    Tensor
        The loss before the update, a detached scalar.
    """
    with frozen(gan.critic):
        loss = gan.generator_loss(gan.generator(latent))
        gan.generator_optimizer.zero_grad()
        loss.backward()
    gan.generator_optimizer.step()
    return loss.detach()


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Parameters of a module get no gradients inside."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
