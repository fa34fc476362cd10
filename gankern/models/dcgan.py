"""Deep convolutional GAN (Radford, Metz, Chintala 2016, https://arxiv.org/abs/1511.06434)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.models.gan import GAN


def conv_generator(latent_dim: int, image_size: int, channels: int, width: int) -> nn.Sequential:
    """Fractionally strided convolutions from (N, latent_dim, 1, 1) by way of 4x4 to the image (Fig. 1)."""
    c = width * image_size // 8
    layers: list[nn.Module] = [nn.ConvTranspose2d(latent_dim, c, 4, bias=False), nn.BatchNorm2d(c), nn.ReLU(True)]
    while c > width:
        layers += [nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(c // 2), nn.ReLU(True)]
        c //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(c, channels, 4, 2, 1), nn.Tanh())


def conv_critic(image_size: int, channels: int, width: int, *, batch_norm: bool = True) -> nn.Sequential:
    """Strided convolutions from the image down to 4x4, then to one score an image, (N,)."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    c = width
    while c < width * image_size // 8:
        layers.append(nn.Conv2d(c, 2 * c, 4, 2, 1, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(2 * c))
        layers.append(nn.LeakyReLU(0.2, True))
        c *= 2
    return nn.Sequential(*layers, nn.Conv2d(c, 1, 4), nn.Flatten(0))


def init_weights(module: nn.Module) -> None:
    """Zero-centred normal weights of deviation 0.02, batch-norm scales around one (Sec. 4, and the authors' code)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


class DCGAN(GAN):
    """DCGAN by the paper's guidelines, with the non-saturating loss of Goodfellow et al. (2014, Sec. 3).

    Strided and fractionally strided convolutions in place of pooling, batch norm everywhere but at the generator's
    output and the discriminator's input, ReLU and tanh in the generator, LeakyReLU 0.2 in the discriminator (Sec. 3);
    Adam with learning rate 2e-4 and beta1 0.5, batches of 128, latents uniform in [-1, 1] (Sec. 4). The paper's `width`
    is 128, at 64x64.

    See `GAN` for the parameters.
    """

    name = "dcgan"

    def __init__(
        self,
        *,
        image_size: int = 32,
        channels: int = 1,
        ops: str = "gankern",
        width: int = 32,
        latent_dim: int = 100,
        batch_size: int = 128,
        n_critic: int = 1,
        lr: float = 2e-4,
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
        self.generator = self._with_ops(conv_generator(latent_dim, image_size, channels, width).apply(init_weights))
        self.critic = self._with_ops(conv_critic(image_size, channels, width).apply(init_weights))
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr, (0.5, 0.999), fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr, (0.5, 0.999), fused=True)

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        real_score, fake_score = self.critic_scores(real, fake)
        return F.binary_cross_entropy_with_logits(
            real_score, torch.ones_like(real_score)
        ) + F.binary_cross_entropy_with_logits(fake_score, torch.zeros_like(fake_score))

    def generator_loss(self, fake: Tensor) -> Tensor:
        score = self.critic(fake)
        return F.binary_cross_entropy_with_logits(score, torch.ones_like(score))

    def sample_latent(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `n` latent vectors uniform in [-1, 1], (n, latent_dim, 1, 1), on the model's device."""
        return torch.rand(n, self.latent_dim, 1, 1, generator=generator, device=self.device) * 2 - 1
