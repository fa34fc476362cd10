"""The main job: a model trained twice on real images, stock and gankern, iteration by iteration in turn."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gankern import data, models
from gankern.bench import gpu, timing
from gankern.bench.check import relative_error
from gankern.bench.results import OURS, STOCK, Measured, TrainingResult
from gankern.models.gan import GAN
from gankern.train import steps

CHECKED = 3
LOSS_TOLERANCE = 1e-3
# Adam and RMSProp divide by the gradient's size: where that is near zero, a rounding error decides the sign of a full
# step. Stock PyTorch leaves itself by up to 0.09 when only its memory layout changes; a wrong gradient gives about 1.
PARAMETER_TOLERANCE = 0.2

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Batch:
    """What one iteration consumes: images and latents of each critic step, latents of the generator step."""

    real: list[Tensor]
    latents: list[Tensor]
    seed: int


def iteration(gan: GAN, batch: Batch, by: Any = steps) -> list[Tensor]:
    """Run the critic steps and the generator step of one iteration; return their losses.

    `by` has them as functions, with the arguments of those of `gankern.train.steps`.
    """
    gpu.seed(batch.seed)
    losses = [by.critic_step(gan, real, latent) for real, latent in zip(batch.real, batch.latents, strict=False)]
    return [*losses, by.generator_step(gan, batch.latents[-1])]


def batches(gan: GAN, images: Tensor, seed: int) -> Iterator[Batch]:
    """Draw what both sides will see, without end."""
    generator = torch.Generator().manual_seed(seed)
    reals = data.batches(images, gan.batch_size, generator)
    number = 0
    while True:
        number += 1
        real = [next(reals) for _ in range(gan.n_critic)]
        latents = [gan.sample_latent(gan.batch_size, generator) for _ in range(gan.n_critic + 1)]
        yield Batch(real, latents, seed + number)


def agreement(sides: dict[str, GAN], start: GAN, losses: dict[str, list[float]]) -> tuple[float, float]:
    """How far gankern's training has left stock's.

    Returns
    -------
    tuple of float
        ||losses - stock losses|| / ||stock losses||, and the larger of both networks'
        ||parameters - stock parameters|| / ||stock parameters - initial parameters||: measured by the way gone, since
        parameters hardly move in a few steps and even a wrong step would leave them close to each other.
    """
    loss_error = relative_error([torch.tensor(losses[OURS])], [torch.tensor(losses[STOCK])])
    errors = []
    for network in ("generator", "critic"):
        initial, stock, ours = (list(getattr(g, network).parameters()) for g in (start, sides[STOCK], sides[OURS]))
        errors.append(relative_error(_differences(ours, initial), _differences(stock, initial)))
    return loss_error, max(errors)


def train_both(
    model: str,
    images: Tensor,
    *,
    seed: int = 0,
    seconds: float = 24.0,
    iterations: int = 10_000,
    clock: timing.Clock = time.perf_counter,
    progress: Progress = lambda fraction: None,
    **overrides: object,
) -> tuple[TrainingResult, GAN]:
    """Train a model on stock PyTorch and on gankern from the same weights, batches, latents and random numbers.

    Parameters
    ----------
    model : str
        A name of `gankern.models`.
    images : Tensor
        (N, C, H, W) in [-1, 1].
    seconds : float
        Both sides together train for about that long.
    iterations : int
        Iterations after which to end earlier.
    progress : callable
        Told the share of the work that is done.
    **overrides
        Passed to `gankern.models.build`.

    Returns
    -------
    tuple of TrainingResult and GAN
        The result, without any time where the two did not agree over the first `CHECKED` iterations; and gankern's GAN.
    """
    sides: dict[str, GAN] = {}
    for name in (STOCK, OURS):
        torch.manual_seed(seed)
        sides[name] = models.build(model, image_size=images.shape[-1], channels=images.shape[1], ops=name, **overrides)
    for network in ("generator", "critic"):
        getattr(sides[OURS], network).load_state_dict(getattr(sides[STOCK], network).state_dict())
    start = copy.deepcopy(sides[STOCK])
    feed = batches(start, images, seed)

    losses: dict[str, list[float]] = {STOCK: [], OURS: []}
    for _ in range(CHECKED):
        batch = next(feed)
        for name, gan in sides.items():
            losses[name] += [loss.item() for loss in iteration(gan, batch)]
    loss_error, parameter_error = agreement(sides, start, losses)
    agrees = loss_error <= LOSS_TOLERANCE and parameter_error <= PARAMETER_TOLERANCE
    common = TrainingResult(
        model,
        status="ok" if agrees else "wrong",
        message=""
        if agrees
        else f"after {CHECKED} iterations losses differ by {loss_error:.1e} "
        f"(limit {LOSS_TOLERANCE:.0e}), parameters by {parameter_error:.1e} of the way gone "
        f"(limit {PARAMETER_TOLERANCE:.0e})",
        batch_size=start.batch_size,
        n_critic=start.n_critic,
        images=start.batch_size * start.n_critic,
        checked=CHECKED,
        loss_error=loss_error,
        parameter_error=parameter_error,
        losses=losses,
    )
    if not agrees:
        return common, sides[OURS]

    times: dict[str, list[float]] = {STOCK: [], OURS: []}
    began = clock()
    for done in range(iterations):
        share = max((clock() - began) / seconds, done / iterations)
        progress(min(share, 1.0))
        if share >= 1 and done >= timing.MIN_ROUNDS:
            break
        batch = next(feed)
        work = {name: partial(iteration, gan, batch) for name, gan in sides.items()}
        for name, taken in timing.rounds(work, 1, clock=clock).items():
            times[name] += taken
    batch = next(feed)
    measured = {
        name: Measured(timing.Spread.of(times[name]), timing.peak_memory(partial(iteration, gan, batch)))
        for name, gan in sides.items()
    }
    *_, ratio = timing.ratio(times, [OURS])
    return replace(common, iterations=len(times[OURS]), sides=measured, ratio=ratio), sides[OURS]


def _differences(ends: Sequence[Tensor], starts: Sequence[Tensor]) -> list[Tensor]:
    return [end.detach() - start.detach() for end, start in zip(ends, starts, strict=True)]
