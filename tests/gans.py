"""Generators and discriminators in the styles in which people write them."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttributeGenerator(nn.Module):
    """DCGAN with one attribute a layer and activations called as functions."""

    def __init__(self, z: int = 5, width: int = 4) -> None:
        super().__init__()
        self.deconv1 = nn.ConvTranspose2d(z, width * 4, 4, 1, 0)
        self.deconv1_bn = nn.BatchNorm2d(width * 4)
        self.deconv2 = nn.ConvTranspose2d(width * 4, width * 2, 4, 2, 1, bias=False)
        self.deconv2_bn = nn.BatchNorm2d(width * 2)
        self.deconv3 = nn.ConvTranspose2d(width * 2, width, 4, 2, 1)
        self.deconv3_bn = nn.BatchNorm2d(width, momentum=None)
        self.deconv4 = nn.ConvTranspose2d(width, 3, 4, 2, 1)

    def forward(self, input: Tensor) -> Tensor:
        x = input.view(input.size(0), -1, 1, 1)
        x = F.relu(self.deconv1_bn(self.deconv1(x)))
        x = F.leaky_relu(self.deconv2_bn(self.deconv2(x)), 0.3)
        x = self.deconv3_bn(self.deconv3(x)).relu()
        return torch.tanh(self.deconv4(x))


class AttributeDiscriminator(nn.Module):
    """Its counterpart, with modules for activations, one of them shared and in place."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 4, 2, 1)
        self.conv2 = nn.Conv2d(width, width * 2, 4, 2, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width * 2)
        self.conv3 = nn.Conv2d(width * 2, width * 4, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(width * 4)
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.fc = nn.Linear(width * 4, 1)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = self.act(self.conv1(x))
        x = self.act(self.norm2(self.conv2(x)))
        h = self.act(self.norm3(self.conv3(x)))
        out = self.fc(h.mean([2, 3]))
        return (out, h) if return_features else out


class ListGenerator(nn.Module):
    """Layers in lists, called in a loop."""

    def __init__(self, channels: tuple[int, ...] = (5, 8, 6, 4)) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(channels))
        self.convs = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in pairs)
        self.bns = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        self.to_rgb = nn.Conv2d(channels[-1], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = F.relu(bn(conv(x)), inplace=True)
        return torch.tanh(self.to_rgb(x))


class ResBlock(nn.Module):
    """Of a generator, as in SNGAN: norm first, upsampling in between, a learned shortcut."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.b1 = nn.BatchNorm2d(channels)
        self.c1 = nn.Conv2d(channels, out, 3, padding=1)
        self.b2 = nn.BatchNorm2d(out)
        self.c2 = nn.Conv2d(out, out, 3, padding=1)
        self.c_sc = nn.Conv2d(channels, out, 1)
        self.activation = F.relu

    def residual(self, x: Tensor) -> Tensor:
        h = self.activation(self.b1(x))
        h = self.c1(F.interpolate(h, scale_factor=2))
        return self.c2(self.activation(self.b2(h)))

    def shortcut(self, x: Tensor) -> Tensor:
        return self.c_sc(F.interpolate(x, scale_factor=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class ResGenerator(nn.Module):
    """A linear layer, residual blocks in a Sequential, and a head of attributes."""

    def __init__(self, z: int = 5, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(z, width * 4)
        self.blocks = nn.Sequential(ResBlock(width, width), ResBlock(width, 4))
        self.bn = nn.BatchNorm2d(4)
        self.out = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.linear(z).view(-1, self.width, 2, 2)
        h = torch.relu(self.bn(self.blocks(h)))
        return self.out(h).tanh()


class BasicBlock(nn.Module):
    """As in ResNet: norm after convolution, the sum in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class UnetBlock(nn.Module):
    """As in pix2pix: each level wraps the next, inside out."""

    def __init__(self, outer: int, inner: int, submodule: nn.Module | None = None, outermost: bool = False) -> None:
        super().__init__()
        self.outermost = outermost
        inward = 3 if outermost else outer
        down: list[nn.Module] = [nn.Conv2d(inward, inner, 4, 2, 1, bias=False)]
        if not outermost:
            down.insert(0, nn.LeakyReLU(0.2, False))
        if submodule is not None and not outermost:
            down.append(nn.BatchNorm2d(inner))
        up_in = inner if submodule is None else inner * 2
        up = [nn.ReLU(False), nn.ConvTranspose2d(up_in, outer, 4, 2, 1)]
        up += [nn.Tanh()] if outermost else [nn.BatchNorm2d(outer)]
        self.model = nn.Sequential(*down, *([] if submodule is None else [submodule]), *up)

    def forward(self, x: Tensor) -> Tensor:
        if self.outermost:
            return self.model(x)
        return torch.cat([x, self.model(x)], 1)


def pix2pix() -> nn.Module:
    return UnetBlock(3, 4, UnetBlock(4, 6, UnetBlock(6, 8)), outermost=True)


class SkipUnet(nn.Module):
    """Levels as attributes, skips by torch.cat; what is skipped to is used twice."""

    def __init__(self, w: int = 4) -> None:
        super().__init__()
        self.e1, self.e2 = nn.Conv2d(3, w, 4, 2, 1), nn.Conv2d(w, 2 * w, 4, 2, 1)
        self.n2 = nn.BatchNorm2d(2 * w)
        self.d2, self.m2 = nn.ConvTranspose2d(2 * w, w, 4, 2, 1), nn.BatchNorm2d(w)
        self.d1 = nn.ConvTranspose2d(2 * w, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.e1(x)
        e2 = self.n2(self.e2(F.leaky_relu(e1, 0.2)))
        d2 = self.m2(self.d2(F.relu(e2)))
        return torch.tanh(self.d1(F.relu(torch.cat([d2, e1], dim=1))))


class ConditionalGenerator(nn.Module):
    """Labels by an embedding, joined to the noise."""

    def __init__(self, classes: int = 3, z: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, z)
        self.first = nn.Sequential(nn.ConvTranspose2d(2 * z, 8, 4), nn.BatchNorm2d(8), nn.ReLU(True))
        self.conv, self.bn = nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, z: Tensor, *, labels: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = torch.cat([z, self.embed(labels)], 1)[:, :, None, None]
        h = F.relu(self.bn(self.conv(self.first(x))))
        return {"image": torch.tanh(self.last(h)) * scale, "features": h}


class ProgressiveGenerator(nn.Module):
    """Grows by a depth, and fades its newest level in by alpha: both are attributes that change while training."""

    def __init__(self, z: int = 5, width: int = 6, levels: int = 3) -> None:
        super().__init__()
        self.depth, self.alpha = 0, 1.0
        self.start = nn.ConvTranspose2d(z, width, 4)
        self.start_bn = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(levels))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(levels))
        self.to_rgb = nn.ModuleList(nn.Conv2d(width, 3, 1) for _ in range(levels + 1))
        self.act = nn.LeakyReLU(0.2)

    def forward(self, z: Tensor) -> Tensor:
        x = self.act(self.start_bn(self.start(z.unflatten(1, (-1, 1, 1)))))
        if self.depth == 0:
            return self.to_rgb[0](x)
        for i in range(self.depth):
            before = x
            x = self.act(self.norms[i](self.blocks[i](F.interpolate(x, scale_factor=2))))
        out = self.to_rgb[self.depth](x)
        if self.alpha < 1:
            old = F.interpolate(self.to_rgb[self.depth - 1](before), scale_factor=2)
            out = self.alpha * out + (1 - self.alpha) * old
        return out


class ConvBlock(nn.Sequential):
    """A Sequential that only has a constructor of its own."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU())


class Discriminator(nn.Module):
    """Convolutions without batch norm, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 4, 2, 1), nn.Conv2d(4, 8, 4, 2, 1), nn.Conv2d(8, 1, 2)
        self.block = ConvBlock(8, 8)

    def forward(self, *images: Tensor) -> list[Tensor]:
        scores = []
        for x in images:
            h = F.leaky_relu(self.a(x), 0.2)
            h = F.leaky_relu(self.b(h), negative_slope=0.2)
            scores.append(self.c(self.block(h)).flatten(1))
        return scores
