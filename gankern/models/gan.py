"""What every reference GAN has in common."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gankern import fuse
from gankern.models.checks import check_image_size, check_positive, check_positive_int
from gankern.models.coupling import couples_samples

OPS = ("gankern", "stock")
#: Real images up to which one call on real and fake images is faster than two; see `GAN.critic_scores`.
BATCHED_CRITIC_IMAGES = 16


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
    batched_critic : bool or None
        Whether the critic scores real and fake images in one call on both; see `critic_scores`. None, the default,
        does so where it is faster.

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
    batched_critic: bool | None = None

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

    @property
    def critic_couples_samples(self) -> bool:
        """Whether an image's score may depend on its batch; a subclass whose critic's own layers do not may say so."""
        return couples_samples(self.critic)

    def critic_scores(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of `real` and of `fake` images, by one call of the critic on both where `batched_critic` asks for it.

        A critic that couples the samples of a batch is always called twice. One call pays for small batches. Measured
        with WGAN-GP's critic, forward and backward, on one CPU thread, the time of two calls over that of one: for 16
        images 1.27 at 16x16 and 1.00 to 1.07 at 32x32, for 64 images 0.86 to 1.02 and 0.74 to 0.92. Automatic hence
        means up to 16 images.
        """
        wanted = self.batched_critic
        if wanted is None:
            wanted = len(real) <= BATCHED_CRITIC_IMAGES
        if not wanted or self.critic_couples_samples:
            return self.critic(real), self.critic(fake)
        scores = self.critic(torch.cat([real, fake]))
        # A critic may flatten several scores an image into the batch's dimension.
        n = len(real) * len(scores) // (len(real) + len(fake))
        return scores[:n], scores[n:]

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
