"""Critics as people write them, none of which is in the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm([inputs, side, side])
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.LayerNorm([outputs, side, side])
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return F.avg_pool2d(y + self.skip(x), 2)


def residual(width: int = 8, side: int = 16) -> nn.Module:
    """Residual blocks with layer norm."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        Block(width, width, side),
        Block(width, 2 * width, side // 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * (side // 4) ** 2, 1),
    )


def patch_gan(width: int = 8, norm: type[nn.Module] = nn.InstanceNorm2d) -> nn.Module:
    """PatchGAN: a score for each patch."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for c in (width, 2 * width):
        layers += [nn.Conv2d(c, 2 * c, 4, 2, 1), norm(2 * c), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4, 1, 1))


def patch_gan_batch_norm() -> nn.Module:
    return patch_gan(norm=nn.BatchNorm2d)


def points(width: int = 128) -> nn.Module:
    """Perceptron on points of the plane."""
    return nn.Sequential(
        nn.Linear(2, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 1),
    )


class Projection(nn.Module):
    """Projection discriminator (Miyato and Koyama 2018)."""

    def __init__(self, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(3, width, 3, padding=1),
                nn.Conv2d(width, 2 * width, 4, 2, 1),
                nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
            ]
        )
        self.score = nn.Linear(4 * width, 1)
        self.embedding = nn.Embedding(classes, 4 * width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
        h = x.sum((2, 3))
        return self.score(h).squeeze(1) + (self.embedding(y) * h).sum(1)


def projection() -> nn.Module:
    return Projection()


def plane_generator() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))


def not_a_module() -> int:
    return 3


def constant() -> nn.Module:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x))

    return Constant()
