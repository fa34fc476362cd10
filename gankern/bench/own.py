"""Networks of the user's own, named on the command line, and what they are trained on and by."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gankern.arguments import UsageError, first_line

LOSSES = ("wgan-gp", "wgan", "gan")
CLIP = 0.01


def build(argument: str, spec: str) -> nn.Module:
    """Call the factory that ``"module:factory"`` names; the module may lie in the current folder.

    Parameters
    ----------
    argument : str
        The option that the spec was given by, for errors.
    spec : str
        ``module:factory``. The factory takes no argument and returns an ``nn.Module``, or is one.

    Returns
    -------
    torch.nn.Module
        In training mode.

    Raises
    ------
    UsageError
        If there is no such factory, it fails, or what it makes is no module.
    """
    module, _, name = spec.partition(":")
    if not (module and name):
        raise UsageError(f"argument {argument}: expected MODULE:FACTORY, got {spec!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory: Any = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
        made = factory if isinstance(factory, nn.Module) else factory()
    except (Exception, SystemExit) as error:
        raise UsageError(f"argument {argument}: {spec}: {first_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"argument {argument}: {spec}: expected an nn.Module, got {type(made).__name__}")
    return made.train()


def copied(*networks: nn.Module | None) -> tuple[Any, ...]:
    """Copy networks, also where a forward has left tensors of its graph on them, as that of `spectral_norm` does."""
    modules = [module for network in networks if network is not None for module in network.modules()]
    left = [value for module in modules for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(networks, {id(value): value.detach().clone() for value in left if not value.is_leaf})


def latent_shape(generator: nn.Module) -> tuple[int, ...]:
    """Guess a latent vector's shape from the generator's first linear layer or convolution."""
    for module in generator.modules():
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        if isinstance(module, _ConvNd):
            return (module.in_channels, *[1] * len(module.kernel_size))
    raise UsageError("argument --latent: needed, since --generator has no linear layer or convolution to tell it")


@dataclass
class Subject:
    """Networks with what their training steps need.

    Attributes
    ----------
    critic : torch.nn.Module
        ``critic(x)``, or ``critic(x, y)`` with labels, gives scores of any shape.
    generator : torch.nn.Module or None
        ``generator(z)``, or ``generator(z, y)`` if it takes labels. Without one, fakes are drawn like real samples.
    shape, latent : tuple of int
        Of one sample and of one latent vector.
    labels : int or None
        Number of classes, where the critic takes labels.
    loss : {"wgan-gp", "wgan", "gan"}
    device : torch.device
    dtype : torch.dtype
        bfloat16 means autocast.
    """

    critic: nn.Module
    generator: nn.Module | None
    shape: tuple[int, ...]
    latent: tuple[int, ...] = ()
    labels: int | None = None
    loss: str = "wgan-gp"
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.critic.to(self.device)
        if self.generator is not None:
            self.generator.to(self.device)
            self.latent = self.latent or latent_shape(self.generator)

    def samples(self, n: int) -> Tensor:
        """Draw (n, *shape): images in [-1, 1], or points of a normal distribution."""
        if len(self.shape) > 1:
            return torch.rand(n, *self.shape, device=self.device).mul_(2).sub_(1)
        return torch.randn(n, *self.shape, device=self.device)

    def latents(self, n: int) -> Tensor:
        """Draw (n, *latent) from a normal distribution."""
        return torch.randn(n, *self.latent, device=self.device)

    def classes(self, n: int) -> tuple[Tensor, ...]:
        """Draw n labels as the critic's further inputs; nothing where it takes none."""
        return () if self.labels is None else (torch.randint(self.labels, (n,), device=self.device),)

    @property
    def generator_takes_labels(self) -> bool:
        """Whether the generator has room for labels after its latent vectors."""
        if self.generator is None or self.labels is None:
            return False
        parameters = inspect.signature(self.generator.forward).parameters.values()
        return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) > 1

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, where it was asked for."""
        mixed = self.dtype is torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()

    def critic_loss(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """What the critic minimises, without a penalty."""
        if self.loss == "gan":
            return F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean()
        return fake_scores.mean() - real_scores.mean()

    def generator_loss(self, fake_scores: Tensor) -> Tensor:
        """What the generator minimises."""
        return F.softplus(-fake_scores).mean() if self.loss == "gan" else -fake_scores.mean()

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Stock optimizer with the settings of the loss's paper."""
        params = list(network.parameters())
        if self.loss == "wgan":
            return torch.optim.RMSprop(params, lr=5e-5)
        lr, betas = (1e-4, (0.0, 0.9)) if self.loss == "wgan-gp" else (2e-4, (0.5, 0.999))
        return torch.optim.Adam(params, lr, betas, fused=True)

    def check(self, batch: int) -> None:
        """Run both networks once.

        Raises
        ------
        UsageError
            If one of them fails, or does not fit the other or the shape.
        """
        real, classes = self.samples(batch), self.classes(batch)
        if self.generator is not None:
            z = self.latents(batch)
            given = (z, *classes) if self.generator_takes_labels else (z,)
            fake = self._tried("--generator", self.generator, given, "--latent and --labels")
            if not isinstance(fake, Tensor) or fake.shape != real.shape:
                got = tuple(fake.shape) if isinstance(fake, Tensor) else type(fake).__name__
                raise UsageError(f"argument --generator: expected samples of shape {tuple(real.shape)}, got {got}")
        scores = self._tried("--critic", self.critic, (real, *classes), "--shape and --labels")
        if not isinstance(scores, Tensor) or not scores.requires_grad:
            got = "one without a gradient" if isinstance(scores, Tensor) else type(scores).__name__
            raise UsageError(f"argument --critic: expected a Tensor that depends on the parameters, got {got}")

    def _tried(self, argument: str, network: Callable[..., Any], given: tuple[Tensor, ...], by: str) -> Any:
        try:
            with self.autocast():
                return network(*given)
        except Exception as error:
            shapes = " and ".join(str(tuple(t.shape)) for t in given)
            raise UsageError(f"argument {argument}: called with {shapes} (see {by}): {first_line(error)}") from error
