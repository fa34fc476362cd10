"""The critic step of a subject: stock, on gankern, and with one change at a time."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import gankern
from gankern.bench import stock
from gankern.bench.cases.own import own_cases
from gankern.bench.measure import Checked, checked
from gankern.bench.own import CLIP, copied
from gankern.bench.results import OURS, STOCK
from gankern.ops.gradient_penalty import PenaltyExplanation
from gankern.ops.gradient_penalty.autograd import holds_gradients
from gankern.profile.feed import Feed
from gankern.profile.recorder import CriticSteps

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
    feed : Feed
        Its subject's critic is copied.
    changes : Changes
    """

    def __init__(self, feed: Feed, changes: Changes) -> None:
        self.feed, self.subject, self.changes = feed, feed.subject, changes
        (self.critic,) = copied(self.subject.critic)
        if changes.fused:
            gankern.fuse(self.critic)
        params: list[Tensor] = list(self.critic.parameters())
        self._clipped = params if self.subject.loss == "wgan" and not changes.optimizer else []
        self._optimizer = (
            gankern.optim.RMSprop(params, lr=5e-5, clip=CLIP)
            if changes.optimizer
            else self.subject.optimizer(self.critic)
        )

    def explain(self) -> PenaltyExplanation | None:
        """What gankern takes of the critic's penalty; None without one."""
        if self.subject.loss != "wgan-gp":
            return None
        real, classes = self.feed.real(), self.subject.classes(self.feed.batch)
        with self.subject.autocast():
            found = gankern.explain(gankern.gradient_penalty, self.critic, real, real, *classes)
        return found if isinstance(found, PenaltyExplanation) else None

    def step(self, prof: CriticSteps) -> None:
        """Update the critic once, by one backward pass of the whole loss."""
        subject, critic = self.subject, self.critic
        with prof.step():
            with prof.phase("data"):
                real, classes = self.feed.real(), subject.classes(self.feed.batch)
            with prof.phase("generator forward"), subject.autocast():
                fake = self.feed.fake(classes)
            with prof.phase("real forward"), subject.autocast():
                real_score = critic(real, *classes)
            with prof.phase("fake forward"), subject.autocast():
                fake_score = critic(fake, *classes)
            with subject.autocast():
                loss = subject.critic_loss(real_score, fake_score)
                penalty = self._penalty(prof, real, fake.float(), classes) if subject.loss == "wgan-gp" else None
            with prof.phase("backward"):
                self._optimizer.zero_grad()
                if penalty is None:
                    loss.backward()
                else:
                    self._backward(prof, loss, penalty)
            with prof.phase("optimizer"):
                self._optimizer.step()
                stock.clip_loop(self._clipped, CLIP)

    def _penalty(self, prof: CriticSteps, real: Tensor, fake: Tensor, classes: tuple[Tensor, ...]) -> Tensor:
        with prof.phase("penalty"):
            if self.changes.penalty:
                return gankern.gradient_penalty(self.critic, real, fake, *classes, weight=PENALTY_WEIGHT)
            return self._stock_penalty(prof, real, fake, classes)

    def _backward(self, prof: CriticSteps, loss: Tensor, penalty: Tensor) -> None:
        """Autograd begins with what was computed last: the penalty's part is over when the other loss has its turn."""
        with ExitStack() as part:
            name = "penalty/tail" if holds_gradients(penalty) else "penalty/double backward"
            part.enter_context(prof.phase(name))
            loss.register_hook(lambda grad: part.close())
            (loss + penalty).backward()

    def _stock_penalty(self, prof: CriticSteps, real: Tensor, fake: Tensor, classes: tuple[Tensor, ...]) -> Tensor:
        """As most code has it, each part marked."""
        with prof.phase("penalty/interpolation"):
            alpha = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device)
            x = (alpha * real + (1 - alpha) * fake).requires_grad_()
        with prof.phase("penalty/inner forward"):
            scores = self.critic(x, *classes)
        with prof.phase("penalty/inner gradient"):
            (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        with prof.phase("penalty/tail"):
            return PENALTY_WEIGHT * ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


def make_sides(feed: Feed) -> dict[str, Side]:
    """Stock, gankern, and stock with each single change that can make a difference, where there are several."""
    subject = feed.subject
    fuses = any(run.reason is None for run in gankern.fusion_report(gankern.fuse(*copied(subject.critic))))
    changes = {"penalty": subject.loss == "wgan-gp", "fused": fuses, "optimizer": subject.loss == "wgan"}
    possible = [name for name, applies in changes.items() if applies]
    sides = {STOCK: Side(feed, Changes()), OURS: Side(feed, Changes(**changes))}
    if len(possible) > 1:
        sides |= {name: Side(feed, Changes(**{name: True})) for name in possible}
    return sides


def compiled_step(feed: Feed, compile_seconds: float) -> Checked:
    """Stock's step compiled whole, under `stock.COMPILE_STEP`: what runs it, where it is right, and its compile time.

    It is one phase, of one batch. Where it compiles for longer than `compile_seconds` it is left out.
    """
    subject = feed.subject
    sides = own_cases(subject)[0].setup({"batch": feed.batch}, subject.dtype, str(subject.device))
    return checked(replace(sides, ours={}), [stock.COMPILE_STEP], compile_seconds=compile_seconds)
