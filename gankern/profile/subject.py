"""What the command profiles: a critic, what it is fed, its loss and its optimizer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern import models

#: Loss of each reference GAN.
LOSS_OF = {"wgan-gp": "wgan-gp", "wgan": "wgan", "dcgan": "gan"}
CLIP = 0.01
# Batches that the pool of data holds.
_POOL = 4


class UsageError(ValueError):
    """An argument that cannot be used; the message is one line."""


@dataclass
class Subject:
    """A critic step's ingredients; both sides draw the same kind of data.

    Attributes
    ----------
    name : str
        In a line, for people.
    critic : torch.nn.Module
    generator : torch.nn.Module or None
        Without one the fakes are drawn like the real data.
    shape, latent : tuple of int
        Of one sample and of one latent vector.
    labels : int or None
        Classes, where the critic takes labels as its second argument.
    loss : {"wgan-gp", "wgan", "gan"}
    batch : int
    device : torch.device
    dtype : torch.dtype
        bfloat16 means autocast.
    """

    name: str
    critic: nn.Module
    generator: nn.Module | None
    shape: tuple[int, ...]
    latent: tuple[int, ...]
    labels: int | None
    loss: str
    batch: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.critic.to(self.device)
        if self.generator is not None:
            self.generator.to(self.device)
        draw = torch.rand if len(self.shape) > 1 else torch.randn
        self._pool = draw(_POOL * self.batch, *self.shape, device=self.device)
        if len(self.shape) > 1:
            self._pool.mul_(2).sub_(1)

    def data(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Real samples, and labels where the critic takes them."""
        real = self._pool[torch.randint(len(self._pool), (self.batch,), device=self.device)]
        if self.labels is None:
            return real, ()
        return real, (torch.randint(self.labels, (self.batch,), device=self.device),)

    @torch.no_grad()
    def fake(self) -> Tensor:
        """Samples of the generator."""
        if self.generator is None:
            return self.data()[0]
        return self.generator(torch.randn(self.batch, *self.latent, device=self.device))

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, where it was asked for."""
        mixed = self.dtype is torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()

    def score_loss(self, real_score: Tensor, fake_score: Tensor) -> Tensor:
        """The critic's loss without a penalty."""
        if self.loss == "gan":
            ones, zeros = torch.ones_like(real_score), torch.zeros_like(fake_score)
            score = F.binary_cross_entropy_with_logits
            return score(real_score, ones) + score(fake_score, zeros)
        return fake_score.mean() - real_score.mean()

    def optimizer(self, critic: nn.Module, *, gankern: bool) -> tuple[torch.optim.Optimizer, float | None]:
        """Optimizer of the loss's paper, and the bound that weights are still to be clipped to after its step."""
        params = list(critic.parameters())
        if self.loss == "wgan" and gankern:
            from gankern import optim

            return optim.RMSprop(params, lr=5e-5, clip=CLIP), None
        if self.loss == "wgan":
            return torch.optim.RMSprop(params, lr=5e-5), CLIP
        lr, betas = (1e-4, (0.0, 0.9)) if self.loss == "wgan-gp" else (2e-4, (0.5, 0.999))
        return torch.optim.Adam(params, lr, betas, fused=True), None

    def check(self) -> None:
        """Run generator and critic once.

        Raises
        ------
        UsageError
            If one of them fails, or does not fit the other or the loss.
        """
        fake = self._tried("--generator", self.fake, f"generator(z) of shape {(self.batch, *self.latent)}")
        if tuple(fake.shape) != (self.batch, *self.shape):
            raise UsageError(
                f"argument --generator: must make {(self.batch, *self.shape)}, as --batch and --shape say; "
                f"got {tuple(fake.shape)}"
            )
        real, labels = self.data()
        given = f"critic(x{', y' if labels else ''}) of shape {tuple(real.shape)}, from --batch and --shape,"
        scores = self._tried("--critic", lambda: self.critic(real, *labels), given)
        if not isinstance(scores, Tensor) or not scores.requires_grad:
            got = "one without a gradient" if isinstance(scores, Tensor) else type(scores).__name__
            raise UsageError(f"argument --critic: must return a Tensor that depends on its parameters; got {got}")

    def _tried(self, argument: str, call: Callable[[], Any], what: str) -> Any:
        try:
            with self.autocast():
                return call()
        except Exception as error:
            raise UsageError(f"argument {argument}: {what} fails: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def build(argument: str, spec: str) -> nn.Module:
    """Call the factory that ``"module:factory"`` names; the module may lie in the current folder.

    Raises
    ------
    UsageError
        If there is no such factory, it fails, or what it makes is no module.
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise UsageError(f"argument {argument}: expected MODULE:FACTORY, got {spec!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory: Any = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
        made = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise UsageError(f"argument {argument}: {spec}: {one_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"argument {argument}: {spec} must make an nn.Module; got {type(made).__name__}")
    return made.train()


def of_model(name: str, shape: tuple[int, ...], **options: Any) -> Subject:
    """A reference GAN's critic and generator, on stock modules."""
    if len(shape) != 3 or shape[1] != shape[2]:
        raise UsageError(f"argument --shape: {name} needs C,S,S; got {','.join(map(str, shape))}")
    try:
        gan = models.build(name, image_size=shape[1], channels=shape[0], ops="stock")
    except ValueError as error:
        raise UsageError(f"argument --shape: {error}") from error
    loss = options.pop("loss") or LOSS_OF[name]
    latent = (gan.latent_dim, 1, 1)
    return Subject(name, gan.critic, gan.generator, shape, latent, loss=loss, labels=None, **options)
