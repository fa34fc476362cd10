"""What every reference GAN has in common."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gankern import fuse
from gankern.models.checks import check_image_size, check_positive, check_positive_int

OPS = ("gankern", "stock")


class GAN(abc.ABC):
    """Two networks, their objectives and their optimizers.

    A subclass defines its networks once, as plain torch modules; `ops` decides what they run on. Either way the
    ``state_dict`` has the same keys, and the same seed gives the same initial parameters.

    Parameters
    ----------
    image_size : int
        Side of the square images, a power of two of at least 8.
    channels : int
        Channels of the images.
    ops : {"gankern", "stock"}
        Run on gankern's kernels, or on stock PyTorch.
    width : int
        Channels of the layer next to the image; the others are multiples of it.
    latent_dim : int
        Size of the latent vector.
    batch_size : int
        Images a critic step sees.
    n_critic : int
        Critic steps per generator step.
    lr : float
        Learning rate of both optimizers.

    Attributes
    ----------
    generator, critic : torch.nn.Module
        ``generator`` maps (N, latent_dim, 1, 1) to images (N, channels, image_size, image_size) in [-1, 1]; ``critic``
        maps images to N scores.
    generator_optimizer, critic_optimizer : torch.optim.Optimizer

    Raises
    ------
    ValueError
        If an argument is out of its range; the message names it and what was received.
    """

    name: ClassVar[str]
    generator: nn.Module
    critic: nn.Module
    generator_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        ops: str,
        width: int,
        latent_dim: int,
        batch_size: int,
        n_critic: int,
        lr: float,
    ) -> None:
        if ops not in OPS:
            raise ValueError(f"ops: expected one of {', '.join(OPS)}, got {ops!r}")
        check_image_size(image_size)
        check_positive_int(
            channels=channels, width=width, latent_dim=latent_dim, batch_size=batch_size, n_critic=n_critic
        )
        check_positive(lr=lr)
        self.image_size = image_size
        self.channels = channels
        self.ops = ops
        self.width = width
        self.latent_dim = latent_dim
        self.batch_size = batch_size
        self.n_critic = n_critic
        self.lr = lr

    @abc.abstractmethod
    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Scalar the critic minimises on `real` and detached `fake` images, both (N, C, H, W)."""

    @abc.abstractmethod
    def generator_loss(self, fake: Tensor) -> Tensor:
        """Scalar the generator minimises on its images `fake`, (N, C, H, W)."""

    def after_critic_step(self) -> None:
        """Run after each update of the critic; does nothing unless a model constrains its critic."""

    def sample_latent(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `n` latent vectors from a standard normal, (n, latent_dim, 1, 1), on the model's device."""
        return torch.randn(n, self.latent_dim, 1, 1, generator=generator, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.generator.parameters()).device

    def to(self, device: torch.device | str) -> GAN:
        """Move both networks to `device`, in place."""
        self.generator.to(device)
        self.critic.to(device)
        return self

    @property
    def config(self) -> dict[str, Any]:
        """Plain settings from which `gankern.models.from_config` builds the same model again."""
        return {
            "model": self.name,
            "image_size": self.image_size,
            "channels": self.channels,
            "ops": self.ops,
            "width": self.width,
            "latent_dim": self.latent_dim,
            "batch_size": self.batch_size,
            "n_critic": self.n_critic,
            "lr": self.lr,
        }

    def state_dict(self) -> dict[str, Any]:
        """State of both networks and both optimizers."""
        return {
            "generator": self.generator.state_dict(),
            "critic": self.critic.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.generator.load_state_dict(state["generator"])
        self.critic.load_state_dict(state["critic"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])

    def _with_ops(self, network: nn.Module) -> nn.Module:
        return fuse(network) if self.ops == "gankern" else network
