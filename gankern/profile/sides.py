"""The critic step of a subject: stock, on gankern, and with one change at a time."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

import gankern
from gankern.bench.results import OURS, STOCK
from gankern.profile.recorder import CriticSteps
from gankern.profile.subject import Subject

PENALTY_WEIGHT = 10.0


@dataclass(frozen=True)
class Changes:
    """What of a step runs on gankern."""

    penalty: bool = False
    fused: bool = False
    optimizer: bool = False


class Side:
    """A critic of its own, trained step by step.

    Parameters
    ----------
    subject : Subject
        Its critic is copied.
    changes : Changes
    """

    def __init__(self, subject: Subject, changes: Changes) -> None:
        self.subject, self.changes = subject, changes
        self.critic = copy.deepcopy(subject.critic)
        if changes.fused:
            gankern.fuse(self.critic)
        self._optimizer, self._clip = subject.optimizer(self.critic, gankern=changes.optimizer)
        self._is_double_backward = not changes.penalty or self._is_small()

    def _is_small(self) -> bool:
        real, inputs = self.subject.data()
        with self.subject.autocast():
            found = gankern.explain(gankern.gradient_penalty, self.critic, real, real, *inputs)
        return getattr(found, "small", False)

    def step(self, prof: CriticSteps) -> None:
        """Update the critic once; the losses go backward one after the other, so that each has a time of its own."""
        subject, critic = self.subject, self.critic
        with prof.step():
            with prof.phase("data"):
                real, inputs = subject.data()
            with prof.phase("generator forward"), subject.autocast():
                fake = subject.fake()
            with prof.phase("real forward"), subject.autocast():
                real_score = critic(real, *inputs)
            with prof.phase("fake forward"), subject.autocast():
                fake_score = critic(fake, *inputs)
            with prof.phase("backward"):
                self._optimizer.zero_grad()
                with subject.autocast():
                    loss = subject.score_loss(real_score, fake_score)
                loss.backward()
            if subject.loss == "wgan-gp":
                with prof.phase("penalty"):
                    self._penalise(prof, real, fake, inputs)
            with prof.phase("optimizer"):
                self._optimizer.step()
                self._clip_weights()

    def _penalise(self, prof: CriticSteps, real: Tensor, fake: Tensor, inputs: tuple[Tensor, ...]) -> None:
        with self.subject.autocast():
            if self.changes.penalty:
                penalty = gankern.gradient_penalty(self.critic, real, fake, *inputs, weight=PENALTY_WEIGHT)
            else:
                penalty = self._stock_penalty(prof, real, fake, inputs)
        # What gankern hands to autograd are finished gradients, unless the critic is small.
        with prof.phase("penalty/double backward" if self._is_double_backward else "penalty/tail"):
            penalty.backward()

    def _stock_penalty(self, prof: CriticSteps, real: Tensor, fake: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """As most code has it, each part marked."""
        with prof.phase("penalty/interpolation"):
            alpha = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device)
            x = (alpha * real + (1 - alpha) * fake).requires_grad_()
        with prof.phase("penalty/inner forward"):
            scores = self.critic(x, *inputs)
        with prof.phase("penalty/inner gradient"):
            (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        with prof.phase("penalty/tail"):
            return PENALTY_WEIGHT * ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()

    @torch.no_grad()
    def _clip_weights(self) -> None:
        if self._clip is not None:
            for parameter in self.critic.parameters():
                parameter.clamp_(-self._clip, self._clip)


def make_sides(subject: Subject) -> dict[str, Side]:
    """Stock, gankern, and stock with each single change that can make a difference, where there are several."""
    penalised, clipped = subject.loss == "wgan-gp", subject.loss == "wgan"
    stock = Side(subject, Changes())
    fuses = any(run.reason is None for run in gankern.fusion_report(gankern.fuse(copy.deepcopy(subject.critic))))
    changes = {"penalty": penalised, "fused": fuses, "optimizer": clipped}
    possible = [name for name, applies in changes.items() if applies]
    sides = {STOCK: stock, OURS: Side(subject, Changes(**changes))}
    if len(possible) > 1:
        sides |= {name: Side(subject, Changes(**{name: True})) for name in possible}
    return sides
