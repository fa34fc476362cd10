"""Losses and speed between two readings."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from gankern.train.history import History


class Meter:
    """Keeps the losses on their device until `flush`, so that no step waits for them."""

    def __init__(self, history: History, images_per_step: int) -> None:
        self.history = history
        self.images_per_step = images_per_step
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._started = 0.0

    def start(self) -> None:
        """Begin a step; what happens between a `flush` and this is not timed."""
        if not self._steps:
            self._started = time.perf_counter()

    def add(self, step: int, critic_loss: Tensor, generator_loss: Tensor) -> None:
        """End a step."""
        self._steps.append(step)
        self._losses.append(torch.stack((critic_loss, generator_loss)))

    def flush(self) -> str:
        """Move the losses to the history, and describe the last."""
        losses = torch.stack(self._losses).tolist()
        rate = len(losses) * self.images_per_step / (time.perf_counter() - self._started)
        for step, (critic_loss, generator_loss) in zip(self._steps, losses, strict=True):
            self.history.append(step, critic_loss, generator_loss, rate)
        self._steps.clear()
        self._losses.clear()
        return f"critic {critic_loss:.3f}, generator {generator_loss:.3f}, {rate:.0f} images/s"
