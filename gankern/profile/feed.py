"""What the steps of the command are run on."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern import models
from gankern.arguments import UsageError
from gankern.bench.own import Subject

#: Loss of each reference GAN.
LOSS_OF = {"wgan-gp": "wgan-gp", "wgan": "wgan", "dcgan": "gan"}
# Batches of real samples that lie in memory.
_BATCHES = 4


class Feed:
    """Batches for a subject's steps: random samples in the place of a data set.

    Parameters
    ----------
    subject : Subject
    batch : int
        Samples a batch.
    """

    def __init__(self, subject: Subject, batch: int) -> None:
        self.subject, self.batch = subject, batch
        self._pool = subject.samples(_BATCHES * batch)

    def real(self) -> Tensor:
        """Real samples, gathered from memory."""
        return self._pool[torch.randint(len(self._pool), (self.batch,), device=self.subject.device)]

    @torch.no_grad()
    def fake(self, classes: tuple[Tensor, ...]) -> Tensor:
        """Samples of the generator; without one, more of the real ones' kind."""
        if self.subject.generator is None:
            return self.real()
        given = classes if self.subject.generator_takes_labels else ()
        return self.subject.generator(self.subject.latents(self.batch), *given)


def of_model(
    name: str, shape: tuple[int, ...], *, loss: str | None, device: torch.device, dtype: torch.dtype
) -> Subject:
    """A reference GAN's networks, of stock modules.

    Raises
    ------
    UsageError
        If it has no such shape.
    """
    if len(shape) != 3 or shape[1] != shape[2]:
        raise UsageError(f"argument --shape: expected C,S,S for {name}, got {','.join(map(str, shape))}")
    try:
        gan = models.build(name, image_size=shape[1], channels=shape[0], ops="stock")
    except ValueError as error:
        raise UsageError(f"argument --shape: {error}") from error
    latent = (gan.latent_dim, 1, 1)
    return Subject(gan.critic, gan.generator, shape, latent, None, loss or LOSS_OF[name], device, dtype)
