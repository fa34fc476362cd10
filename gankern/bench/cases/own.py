"""Steps of the user's own networks, stock and on gankern."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from gankern.bench import stock
from gankern.bench.cases.case import OURS_CHANNELS_LAST, Case, Run, Sides, Size, gankern, to_channels_last
from gankern.bench.check import Results
from gankern.bench.own import CLIP, Subject, copied
from gankern.bench.results import OURS

# An activation within a rounding error of its kink takes the other slope: stock's own gradients differ by up to 1e-2
# between its memory layouts, where a batch is small.
_TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Batch:
    """What every side's step sees."""

    real: Tensor
    classes: tuple[Tensor, ...]
    latents: Tensor | None
    fake: Tensor
    alpha: Tensor


@dataclass
class Networks:
    """One side's copies of the networks, and how they are updated."""

    subject: Subject
    variant: str
    ours: bool
    critic: nn.Module = field(init=False)
    generator: nn.Module | None = field(init=False)

    def __post_init__(self) -> None:
        self.critic, self.generator = copied(self.subject.critic, self.subject.generator)
        networks = [network for network in (self.critic, self.generator) if network is not None]
        for network in networks:
            if self.variant == "channels_last":
                to_channels_last(network)
            if self.ours:
                gankern().fuse(network)
            # The compiled penalty calls the critic inside of a function that is compiled as a whole.
            elif self.variant == "compile" and not (self.penalised and network is self.critic):
                network.compile(dynamic=False)
        self.clips = self.subject.loss == "wgan"
        self._penalised = self._penalised_loss
        if self.variant == "compile":
            self._penalised = torch.compile(self._penalised_loss, dynamic=False)
        self._optimizers = {id(network): self._optimizer(network) for network in networks}
        self._compiled: dict[int, stock.CompiledGradients] = {}

    @property
    def penalised(self) -> bool:
        return self.subject.loss == "wgan-gp"

    def _optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        if self.ours and self.clips:
            clip = CLIP if network is self.critic else None
            return gankern().optim.RMSprop(network.parameters(), lr=5e-5, clip=clip)
        return self.subject.optimizer(network)

    def update(self, network: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
        optimizer = self._optimizers[id(network)]
        if self.variant == stock.COMPILE_STEP:
            value = self._whole(network, loss)()
        else:
            with self.subject.autocast():
                value = loss()
            optimizer.zero_grad()
            value.backward()
        optimizer.step()
        if self.clips and network is self.critic and not self.ours:
            stock.clip_foreach(list(network.parameters()), CLIP)
        return value.detach()

    def _whole(self, network: nn.Module, loss: Callable[[], Tensor]) -> stock.CompiledGradients:
        """A network's loss and gradients, compiled; of the batch that its first step sees, which every side keeps."""
        if id(network) not in self._compiled:
            mixed = self.subject.device.type if self.subject.dtype is torch.bfloat16 else None
            self._compiled[id(network)] = stock.CompiledGradients(loss, network.parameters(), mixed)
        return self._compiled[id(network)]

    def generate(self, batch: Batch) -> Tensor:
        if self.generator is None or batch.latents is None:
            return batch.fake
        return self.generator(batch.latents, *(batch.classes if self.subject.generator_takes_labels else ()))

    def critic_step(self, batch: Batch) -> Tensor:
        return self.update(self.critic, partial(self._critic_loss, batch))

    def generator_step(self, batch: Batch) -> Tensor:
        assert self.generator is not None
        with ExitStack() as frozen:
            for parameter in self.critic.parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    frozen.callback(parameter.requires_grad_, True)
            return self.update(
                self.generator,
                lambda: self.subject.generator_loss(self.critic(self.generate(batch), *batch.classes)),
            )

    def _critic_loss(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            fake = self.generate(batch).float()
        if self.penalised:
            return self._penalised(batch.real, fake, batch.alpha, *batch.classes)
        return self._score_loss(batch.real, fake, *batch.classes)

    def _score_loss(self, real: Tensor, fake: Tensor, *classes: Tensor) -> Tensor:
        return self.subject.critic_loss(self.critic(real, *classes), self.critic(fake, *classes))

    def _penalised_loss(self, real: Tensor, fake: Tensor, alpha: Tensor, *classes: Tensor) -> Tensor:
        loss = self._score_loss(real, fake, *classes)
        if self.ours:
            return loss + gankern().gradient_penalty(self.critic, real, fake, *classes, alpha=alpha)
        functional = self.variant in ("compile", "func_grad")
        penalty = stock.gradient_penalty_func if functional else stock.gradient_penalty
        return loss + penalty(lambda x: self.critic(x, *classes), real, fake, alpha)


def _draw(subject: Subject, n: int) -> Batch:
    real, fake = subject.samples(n), subject.samples(n)
    latents = None if subject.generator is None else subject.latents(n)
    alpha = torch.rand(n, *[1] * len(subject.shape), device=subject.device)
    return Batch(real, subject.classes(n), latents, fake, alpha)


def _own_case(size: Size, dtype: torch.dtype, device: str, *, subject: Subject, steps: tuple[str, ...]) -> Sides:
    batch = _draw(subject, size["batch"])
    images = len(subject.shape) == 3

    def side(variant: str = "eager", ours: bool = False) -> Run:
        networks = Networks(subject, variant, ours)
        own = batch
        if variant == "channels_last":
            real, fake = (t.contiguous(memory_format=torch.channels_last) for t in (batch.real, batch.fake))
            own = Batch(real, batch.classes, batch.latents, fake, batch.alpha)
        both = [network for network in (networks.critic, networks.generator) if network is not None]
        updated = [n for n, step in zip(both, ("critic_step", "generator_step"), strict=False) if step in steps]
        params = [p for network in updated for p in network.parameters()]

        masked = [m for network in both for m in network.modules() if isinstance(m, _DropoutNd)]
        without_dropout = True

        def run() -> Results:
            nonlocal without_dropout
            # A mask falls on other elements where a side has another memory layout: the check goes without.
            for module in masked:
                module.train(not without_dropout)
            without_dropout = False
            losses = [getattr(networks, step)(own) for step in steps]
            # Adam turns a rounding error in a gradient near zero into a full step: parameters would not agree.
            clipped = {"parameters": params} if networks.clips else {}
            # Those of a second step are of networks that such an update has moved apart.
            gradients = [p.grad for p in updated[0].parameters()]
            return {"loss": losses, "gradients": gradients, **clipped}

        return run

    variants = ["eager", *["channels_last"] * images, "compile", stock.COMPILE_STEP]
    variants += ["func_grad"] * (subject.loss == "wgan-gp")
    ours = {OURS: side(ours=True)}
    if images:
        ours[OURS_CHANNELS_LAST] = side("channels_last", ours=True)
    return Sides(
        reference=side(),
        stock={variant: side(variant) for variant in variants},
        ours=ours,
        work=size["batch"],
        unit="samples",
        left_out=stock.without_compile_step(),
        tolerance=_TOLERANCE[subject.dtype],
    )


def own_cases(subject: Subject, batch: int = 64) -> list[Case]:
    """Cases of the user's own networks: critic step, and with a generator its step and both in one.

    Parameters
    ----------
    subject : Subject
        The networks; copied, never updated.
    batch : int
        Default batch size.

    Returns
    -------
    list of Case
        ``own.critic_step``, ``own.generator_step``, ``own.training_step``.
    """
    kinds: dict[str, tuple[str, ...]] = {"critic_step": ("critic_step",)}
    if subject.generator is not None:
        kinds |= {"generator_step": ("generator_step",), "training_step": ("critic_step", "generator_step")}
    return [
        Case(
            f"own.{name}",
            f"a whole {name.replace('_', ' ')} of your networks, loss {subject.loss}",
            partial(_own_case, subject=subject, steps=steps),
            size={"batch": batch},
            tiny={"batch": 4},
            dtypes=(subject.dtype,),
            sizes={"batch": (8, 16, 32, 64, 128)},
        )
        for name, steps in kinds.items()
    ]


def fusion_notes(subject: Subject) -> dict[str, list[str]]:
    """What of the networks runs on gankern, and why the rest does not: lines under a heading each."""
    notes = {}
    for name, network in (("critic", subject.critic), ("generator", subject.generator)):
        if network is not None:
            runs = gankern().fusion_report(gankern().fuse(*copied(network)))
            lines = [f"{run.module or name}: {' + '.join(run.names)}: {run.reason or 'fused'}" for run in runs]
            notes[f"fuse({name})"] = lines or ["nothing to fuse"]
    if subject.loss == "wgan-gp":
        real = subject.samples(4)
        classes = subject.classes(4)
        found = gankern().explain(gankern().gradient_penalty, *copied(subject.critic), real, real, *classes)
        notes["gradient_penalty"] = str(found).splitlines()
    return notes
