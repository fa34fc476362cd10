"""The one training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gankern.data import batches as make_batches
from gankern.models.checks import check_positive_int
from gankern.models.gan import GAN
from gankern.train.checkpoint import load_checkpoint, restore, save_checkpoint
from gankern.train.history import History
from gankern.train.interrupt import deferred_interrupt
from gankern.train.meter import Meter
from gankern.train.run import Run
from gankern.train.steps import critic_step, generator_step


def fit(
    gan: GAN,
    images: Tensor,
    *,
    steps: int,
    out: Path | str | None = None,
    seed: int = 0,
    sample_every: int = 100,
    checkpoint_every: int = 100,
    log_every: int = 10,
    resume: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    device: torch.device | str = "cpu",
    metadata: Mapping[str, Any] | None = None,
    batched_critic: bool | None = None,
) -> History:
    """Train a GAN.

    A step is one update of the generator, after ``gan.n_critic`` updates of the critic. On one machine the same seed,
    initial model and data give the same run, interrupted and resumed or not. torch's global random state is left as it
    was. The first Ctrl-C ends the run after the step it falls in, with a checkpoint.

    Parameters
    ----------
    gan : GAN
    images : Tensor
        (N, C, H, W) float32 in [-1, 1], of the model's channels and image size; moved to `device` whole.
    steps : int
        Steps in all, those before a resume included.
    out : path, optional
        Folder for ``config.json``, ``losses.csv``, ``checkpoint.pt`` and ``samples/``. Nothing is written without it.
    seed : int
        Seed of latents, shuffles and sample grids. A resumed run keeps the seed it began with.
    sample_every, checkpoint_every, log_every : int
        Steps from one sample grid, checkpoint, or reading of the losses to the next.
    resume : bool
        Go on from the checkpoint in `out`.
    progress : bool
        Show a progress bar.
    tensorboard : bool
        Log to ``out/tensorboard`` too.
    device : torch.device or str
        Where to train.
    metadata : mapping, optional
        Added to ``config.json``.
    batched_critic : bool, optional
        Whether the critic scores real and fake images in one call; sets `GAN.batched_critic`, which stays as it is
        (automatic, unless set) without it. Losses agree to rounding either way.

    Returns
    -------
    History
        Losses of every step.

    Raises
    ------
    ValueError
        If an argument is not valid; the message names it and what was received. A `CheckpointError` if the checkpoint
        to resume from is missing, broken or of another model.
    FileExistsError
        If `out` holds a run and `resume` is not set.
    KeyboardInterrupt
        On Ctrl-C, after the checkpoint.
    """
    check_positive_int(steps=steps, sample_every=sample_every, checkpoint_every=checkpoint_every, log_every=log_every)
    _check_images(images, gan)
    if out is None and (resume or tensorboard):
        raise ValueError(f"out: expected a folder, which {'resume' if resume else 'tensorboard'} needs, got None")
    gan.to(device)
    if batched_critic is not None:
        gan.batched_critic = batched_critic
    run = Run(Path(out), tensorboard=tensorboard) if out is not None else None
    with (
        contextlib.closing(run) if run is not None else contextlib.nullcontext(),
        torch.random.fork_rng([gan.device] if gan.device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        batches = make_batches(images.to(device), gan.batch_size, torch.Generator().manual_seed(seed))
        first, history = 1, History()
        if run is not None and resume:
            state = load_checkpoint(run.folder)
            restore(state, gan, batches)
            first, seed = state["step"] + 1, state["seed"]
            history = run.resume(state["step"])
        elif run is not None:
            history = run.start({"model": gan.config, "seed": seed, **(metadata or {})})

        meter = Meter(history, gan.n_critic * gan.batch_size)
        with (
            deferred_interrupt() as interrupt,
            tqdm(total=steps, initial=first - 1, unit="step", desc=gan.name, disable=not progress) as bar,
        ):
            for step in range(first, steps + 1):
                meter.start()
                for _ in range(gan.n_critic):
                    critic_loss = critic_step(gan, next(batches), gan.sample_latent(gan.batch_size))
                generator_loss = generator_step(gan, gan.sample_latent(gan.batch_size))
                meter.add(step, critic_loss, generator_loss)
                bar.update()

                interrupted = interrupt.requested
                last = interrupted or step == steps
                save = last or step % checkpoint_every == 0
                if save or step % log_every == 0:
                    bar.set_postfix_str(meter.flush())
                    if run is not None:
                        run.log(history)
                if run is not None and (last or step % sample_every == 0):
                    run.save_samples(gan, step, seed)
                if run is not None and save:
                    save_checkpoint(run.folder, gan, batches, step=step, seed=seed)
                if interrupted:
                    raise KeyboardInterrupt
    return history


def _check_images(images: Tensor, gan: GAN) -> None:
    expected = (gan.channels, gan.image_size, gan.image_size)
    if images.ndim != 4 or images.shape[1:] != expected or images.dtype != torch.float32:
        raise ValueError(
            f"images: expected (N, {', '.join(map(str, expected))}) float32 for this model, "
            f"got {tuple(images.shape)} {images.dtype}"
        )
