"""Critics that penalties are tried on."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern import backends
from gankern.ops.critic_layers import Chain, Scope, find


class Residual(nn.Module):
    """Layer norm, functional activations, a shortcut and mean pooling."""

    def __init__(self, channels: int = 4, size: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 1, 1)
        self.norm = nn.LayerNorm([channels, size, size])
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)
        self.head = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.avg_pool2d(x + self.conv(F.relu(self.norm(x))), 2)
        return self.head(x.relu().mean((2, 3))).flatten()


class Minibatch(nn.Module):
    """Layer norm and minibatch discrimination: couples the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 6), nn.LayerNorm(6), nn.Tanh())
        self.minibatch = gankern.nn.MinibatchDiscrimination(6, 3, 2)
        self.head = nn.Linear(9, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.minibatch(self.features(x)))


class InPlace(nn.Module):
    """A shortcut around an activation that overwrites its input: stock adds the overwritten values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return F.leaky_relu_(self.second(F.relu(y, inplace=True)) + y, 0.1).flatten(1).sum(1)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.LeakyReLU(0.2), nn.Linear(192, 192), nn.ReLU())
    model[3].weight = model[1].weight
    return model


def frozen() -> nn.Module:
    model = plain()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(6, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 1, 2, 1, 0),
        nn.Flatten(0),
    )


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "residual": Residual,
    "minibatch": Minibatch,
    "in place": InPlace,
    "tied": tied,
    "frozen": frozen,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 1, bias=False)),
    "unknown layers": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"), nn.GELU(), nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1), nn.SiLU()
    ),
    "patch map": lambda: nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.ReLU(True), nn.Conv2d(4, 1, 3)),
    "grouped, dilated": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, dilation=2, groups=3), nn.LeakyReLU(0.0)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.LeakyReLU(0.3, True), nn.AvgPool2d(2)),
    "group norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.InstanceNorm2d(4)),
    "group and instance norm, pooling": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.GroupNorm(3, 6, affine=False),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.Softplus(),
        nn.AvgPool2d(3, 1, padding=1),
        nn.GroupNorm(1, 4),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
    ),
    "norms, in place": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1),
        nn.InstanceNorm2d(4),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.ReLU(True),
        nn.Linear(64, 1),
    ),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 4)
    ),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 4)),
    "smooth, layer norm without weights": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.LayerNorm([4, 6, 6], elementwise_affine=False),
        nn.Softplus(),
        nn.LayerNorm(6),
        nn.Conv2d(4, 1, 3),
    ),
}


def chain_of(critic: nn.Module) -> Chain:
    """The chain that gankern's layers run of a critic."""
    chain = find(critic)
    assert isinstance(chain, Chain), chain
    return chain


def layered(critic: nn.Module) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A critic by gankern's layers, as a function of its input and parameters, and its input gradient."""
    chain, scope = chain_of(critic), Scope()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return chain.run(scope, x, values)

    def input_gradient(x: Tensor, *values: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        output = run(x, *values).sin().sum()
        with scope.input_gradient():
            return torch.autograd.grad(output, x, create_graph=True)[0]

    return run, input_gradient


@contextmanager
def watched_kernels() -> Iterator[list[weakref.ref[Tensor]]]:
    """What the critic layers' kernels return inside, by references that keep nothing alive."""
    seen: list[weakref.ref[Tensor]] = []

    class Watched:
        def __init__(self, adapter: Any) -> None:
            self._adapter = adapter

        def __getattr__(self, name: str) -> Any:
            value = getattr(self._adapter, name)
            if not callable(value) or name in ("refuse", "channels_last", "like_layout", "conv_weight_grad"):
                return value

            def run(*args: Any) -> Any:
                result = value(*args)
                seen.extend(
                    weakref.ref(t) for t in (result if isinstance(result, tuple) else (result,)) if t is not None
                )
                return result

            return run

    with backends.wrapped("critic_layers", Watched):
        yield seen


def batch(n: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Real, fake and alpha."""
    real, fake = torch.randn(2, n, 3, 8, 8, dtype=torch.float64).to(dtype)
    return real, fake, torch.rand(n, 1, 1, 1, dtype=torch.float64).to(dtype)


def gradients(critic: nn.Module, loss: Tensor) -> list[Tensor]:
    """Gradients of the trainable parameters after a backward of the loss, zeros where stock leaves None."""
    critic.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in critic.parameters() if p.requires_grad]


def both(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    critic = make().to(dtype)
    return critic, copy.deepcopy(critic)
