"""What a user of stock PyTorch writes today: the baselines of the cases, each in its fastest known forms."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Critic = Callable[[Tensor], Tensor]


def batch_norm_relu(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
    """Batch norm, then ReLU in place."""
    return F.relu(F.batch_norm(x, mean, var, weight, bias, training), inplace=True)


def l1_distance(m: Tensor) -> Tensor:
    """Pairwise L1 distances of (N, B, C) by broadcasting: (N, N, B)."""
    return (m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(3)


def l1_distance_cdist(m: Tensor) -> Tensor:
    """Pairwise L1 distances of (N, B, C) by `torch.cdist`: (N, N, B)."""
    t = m.transpose(0, 1)
    return torch.cdist(t, t, p=1.0).permute(1, 2, 0)


def minibatch_discrimination(m: Tensor) -> Tensor:
    """Minibatch features of (N, B, C) by broadcasting: (N, B), each sample's own term left out."""
    return torch.exp(-l1_distance(m)).sum(1) - 1


def minibatch_discrimination_cdist(m: Tensor) -> Tensor:
    """Minibatch features of (N, B, C) by `torch.cdist`: (N, B), each sample's own term left out."""
    return torch.exp(-l1_distance_cdist(m)).sum(1) - 1


def gradient_penalty(critic: Critic, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """WGAN-GP's penalty by `torch.autograd.grad`, as most GAN code has it."""
    x = (alpha * real + (1 - alpha) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return _penalty_tail(gradient)


def gradient_penalty_func(critic: Critic, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """WGAN-GP's penalty by `torch.func.grad`: the form that `torch.compile` can differentiate twice."""
    gradient = torch.func.grad(lambda x: critic(x).sum())(alpha * real + (1 - alpha) * fake)
    return _penalty_tail(gradient)


def wgan_gp_loss(
    critic: Critic, real: Tensor, fake: Tensor, alpha: Tensor, penalty: Callable[..., Tensor] = gradient_penalty_func
) -> Tensor:
    """WGAN-GP's critic loss, with the penalty by `torch.func.grad` unless another is given."""
    return critic(fake).mean() - critic(real).mean() + penalty(critic, real, fake, alpha)


def _penalty_tail(gradient: Tensor) -> Tensor:
    return 10.0 * ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


#: The variant that `CompiledGradients` makes.
COMPILE_STEP = "compile_step"


def without_compile_step() -> dict[str, str]:
    """Why torch has no `COMPILE_STEP`, as variants are left out; empty where it has."""
    import torch._dynamo.config

    if hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return {}
    return {COMPILE_STEP: f"torch {torch.__version__} compiles no torch.autograd.grad (2.13 does, by a flag)"}


class CompiledGradients:
    """A loss with its gradients, both orders in one compiled function: the fastest form that torch 2.13 compiles.

    Parameters
    ----------
    loss : callable
        Scalar of its arguments.
    params : iterable of Tensor
        Get their gradients in ``grad``, in the place of what is there.
    autocast : str or None
        Device type of which the loss is computed in mixed precision with bfloat16.
    """

    def __init__(self, loss: Callable[..., Tensor], params: Iterable[Tensor], autocast: str | None = None) -> None:
        self._params = wanted = list(params)

        def step(*inputs: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            with torch.autocast(autocast or "cpu", torch.bfloat16, enabled=autocast is not None):
                value = loss(*inputs)
            return value.detach(), torch.autograd.grad(value, wanted, allow_unused=True)

        self._run = torch.compile(step, fullgraph=True, dynamic=False)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss, detached."""
        # Off by default, and here alone: with it other functions compile otherwise, too.
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            value, gradients = self._run(*inputs)
        for param, gradient in zip(self._params, gradients, strict=True):
            param.grad = gradient
        return value


@torch.no_grad()
def clip_loop(params: list[Tensor], c: float) -> None:
    """Clamp tensor by tensor, as in the WGAN authors' code."""
    for p in params:
        p.clamp_(-c, c)


@torch.no_grad()
def clip_foreach(params: list[Tensor], c: float) -> None:
    """Clamp all tensors by two multi-tensor calls."""
    torch._foreach_clamp_min_(params, -c)
    torch._foreach_clamp_max_(params, c)


class ConvCritic(nn.Sequential):
    """A critic without norm layers: 3x3 convolutions, leaky ReLU, a linear head."""

    def __init__(self, channels: int, width: int, image_size: int) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 3, 1, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(2 * width, 4 * width, 3, 2, 1),
            nn.LeakyReLU(0.1),
            nn.Flatten(),
            nn.Linear(4 * width * (image_size // 4) ** 2, 1),
            nn.Flatten(0),
        )


class ResidualBlock(nn.Module):
    """Pre-activation residual block that halves the image; layer norm over channels and pixels."""

    def __init__(self, inputs: int, outputs: int, image_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm([inputs, image_size, image_size])
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.LayerNorm([outputs, image_size, image_size])
        self.conv2 = nn.Conv2d(outputs, outputs, 4, stride=2, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.leaky_relu(self.norm2(self.conv1(F.leaky_relu(self.norm1(x), 0.2))), 0.2))
        return y + self.shortcut(F.avg_pool2d(x, 2))


class ResidualCritic(nn.Sequential):
    """A residual critic with layer norm, the kind that WGAN-GP's authors recommend."""

    def __init__(self, channels: int, width: int, image_size: int) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1),
            ResidualBlock(width, 2 * width, image_size),
            ResidualBlock(2 * width, 2 * width, image_size // 2),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * (image_size // 4) ** 2, 1),
            nn.Flatten(0),
        )
