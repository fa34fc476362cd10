"""Endless shuffled batches with a position that can be saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Batches:
    """Iterator that `batches` returns."""

    def __init__(self, images: Tensor, batch_size: int, generator: torch.Generator | None = None) -> None:
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch_size: expected 1 to {len(images)}, the number of images, got {batch_size}")
        self.images = images
        self.batch_size = batch_size
        self.generator = generator if generator is not None else torch.Generator()
        self._shuffle()

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Tensor:
        if self.position + self.batch_size > len(self.images):
            self._shuffle()
        batch = self.images[self.order[self.position : self.position + self.batch_size]]
        self.position += self.batch_size
        return batch

    def _shuffle(self) -> None:
        self.order = torch.randperm(len(self.images), generator=self.generator).to(self.images.device)
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands."""
        return {"order": self.order.cpu(), "position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        if len(state["order"]) != len(self.images):
            raise ValueError(f"images: expected the {len(state['order'])} of the saved run, got {len(self.images)}")
        self.order = state["order"].to(self.images.device)
        self.position = state["position"]
        self.generator.set_state(state["generator"])


def batches(images: Tensor, batch_size: int, generator: torch.Generator | None = None) -> Batches:
    """Iterate without end over shuffled batches.

    Parameters
    ----------
    images : Tensor
        (N, ...); batches are on its device.
    batch_size : int
        Images a batch. Every epoch is shuffled anew and drops its last, incomplete batch.
    generator : torch.Generator, optional
        CPU generator of the shuffles.

    Returns
    -------
    Batches
        Iterator over (batch_size, ...) tensors, with ``state_dict`` and ``load_state_dict``.

    Raises
    ------
    ValueError
        If `batch_size` is not between 1 and N.
    """
    return Batches(images, batch_size, generator)
