"""Wasserstein GAN with weight clipping (Arjovsky, Chintala, Bottou 2017, https://arxiv.org/abs/1701.07875)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern import optim
from gankern.models.checks import check_positive
from gankern.models.dcgan import conv_critic, conv_generator, init_weights
from gankern.models.gan import GAN


class WGAN(GAN):
    """WGAN by Algorithm 1: RMSProp at 5e-5, the critic's weights clipped to [-0.01, 0.01], five critic steps a step.

    The networks are DCGAN's, as in the paper's experiments (Sec. 4). With gankern's ops, clipping is part of the
    critic's RMSProp kernel; with stock ops it is a loop over the parameters after the step.

    Its other parameters are those of `GAN`.

    Parameters
    ----------
    clip : float
        Bound c on the critic's weights.
    """

    name = "wgan"

    def __init__(
        self,
        *,
        image_size: int = 32,
        channels: int = 1,
        ops: str = "gankern",
        width: int = 32,
        latent_dim: int = 100,
        batch_size: int = 64,
        n_critic: int = 5,
        lr: float = 5e-5,
        clip: float = 0.01,
    ) -> None:
        super().__init__(
            image_size=image_size,
            channels=channels,
            ops=ops,
            width=width,
            latent_dim=latent_dim,
            batch_size=batch_size,
            n_critic=n_critic,
            lr=lr,
        )
        check_positive(clip=clip)
        self.clip = clip
        self.generator = self._with_ops(conv_generator(latent_dim, image_size, channels, width).apply(init_weights))
        self.critic = self._with_ops(conv_critic(image_size, channels, width).apply(init_weights))
        if ops == "gankern":
            self.generator_optimizer = optim.RMSprop(self.generator.parameters(), lr=lr)
            self.critic_optimizer = optim.RMSprop(self.critic.parameters(), lr=lr, clip=clip)
        else:
            self.generator_optimizer = torch.optim.RMSprop(self.generator.parameters(), lr=lr)
            self.critic_optimizer = torch.optim.RMSprop(self.critic.parameters(), lr=lr)

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        real_score, fake_score = self.critic_scores(real, fake)
        return fake_score.mean() - real_score.mean()

    def generator_loss(self, fake: Tensor) -> Tensor:
        return -self.critic(fake).mean()

    @torch.no_grad()
    def after_critic_step(self) -> None:
        """Clip the critic's weights, where the optimizer has not done so (Algorithm 1, line 7)."""
        if self.ops == "stock":
            for parameter in self.critic.parameters():
                parameter.clamp_(-self.clip, self.clip)

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"clip": self.clip}
