"""Wasserstein GAN with gradient penalty (Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gankern import gradient_penalty
from gankern.models.checks import check_positive
from gankern.models.dcgan import conv_critic, conv_generator
from gankern.models.gan import GAN


def stock_gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, *, weight: float, alpha: Tensor) -> Tensor:
    """The penalty as it is usually written: autograd through autograd."""
    x = (alpha * real + (1 - alpha) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return weight * ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


class WGANGP(GAN):
    """WGAN-GP by Algorithm 1: Adam at 1e-4 with betas (0, 0.9), penalty weight 10, five critic steps a step.

    The networks are DCGAN's, without batch norm in the critic, which would mix the samples at each of which the penalty
    holds the critic's gradient to norm 1 (Sec. 4).

    Its other parameters are those of `GAN`.

    Parameters
    ----------
    penalty_weight : float
        Weight lambda of the gradient penalty (Eq. 3).
    """

    name = "wgan-gp"

    def __init__(
        self,
        *,
        image_size: int = 32,
        channels: int = 1,
        ops: str = "gankern",
        width: int = 32,
        latent_dim: int = 128,
        batch_size: int = 64,
        n_critic: int = 5,
        lr: float = 1e-4,
        penalty_weight: float = 10.0,
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
        check_positive(penalty_weight=penalty_weight)
        self.penalty_weight = penalty_weight
        self.generator = self._with_ops(conv_generator(latent_dim, image_size, channels, width))
        self.critic = self._with_ops(conv_critic(image_size, channels, width, batch_norm=False))
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr, (0.0, 0.9), fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr, (0.0, 0.9), fused=True)

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        penalty = gradient_penalty if self.ops == "gankern" else stock_gradient_penalty
        alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
        real_score, fake_score = self.critic_scores(real, fake)
        return (
            fake_score.mean()
            - real_score.mean()
            + penalty(self.critic, real, fake, weight=self.penalty_weight, alpha=alpha)
        )

    def generator_loss(self, fake: Tensor) -> Tensor:
        return -self.critic(fake).mean()

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"penalty_weight": self.penalty_weight}
