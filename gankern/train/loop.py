"""The one training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gankern._files import WriteError
from gankern.data import batches as make_batches
from gankern.models.checks import check_positive_int
from gankern.models.gan import GAN
from gankern.train.checkpoint import load_checkpoint, restore
from gankern.train.history import History
from gankern.train.interrupt import deferred_interrupt
from gankern.train.meter import Meter
from gankern.train.progress import Progress
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

    Files of the run are written whole or not at all, the checkpoint last: whenever the process ends, `out` holds a
    state to resume from, that of the last checkpoint. While it runs no other run may write to `out`; sampling may.

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
        Show a progress bar, or lines now and then where stderr is no terminal.
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
        to resume from is missing, broken or of another model, or its ``losses.csv`` is.
    FileExistsError
        If `out` holds a run and `resume` is not set.
    BlockingIOError
        If another run, whose process the message names, is writing to `out`.
    OSError
        If a file cannot be written; the message says which, why, and which step `out` holds.
    KeyboardInterrupt
        On Ctrl-C, after the checkpoint; the message says which step `out` holds.
    """
    check_arguments(gan, images, steps, sample_every, checkpoint_every, log_every)
    if out is None and (resume or tensorboard):
        raise ValueError(f"out: expected a folder, which {'resume' if resume else 'tensorboard'} needs, got None")
    run = Run(Path(out), tensorboard=tensorboard) if out is not None else None
    gan.to(device)
    if batched_critic is not None:
        gan.batched_critic = batched_critic
    with (
        _saying_what_is_saved(run),
        run.held(make=not resume) if run is not None else contextlib.nullcontext(),
        torch.random.fork_rng([gan.device] if gan.device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        batches = make_batches(images.to(device), gan.batch_size, torch.Generator().manual_seed(seed))
        first, history = 1, History()
        if run is not None and resume:
            state = load_checkpoint(run.folder)
            restore(state, gan, batches, run.folder)
            first, seed = state["step"] + 1, state["seed"]
            history = run.resume(state["step"], state.get("losses"))
        elif run is not None:
            history = run.start({"model": gan.config, "seed": seed, **(metadata or {})})

        meter = Meter(history, gan.n_critic * gan.batch_size)
        with deferred_interrupt() as interrupt, Progress(gan.name, first - 1, steps, shown=progress) as shown:
            for step in range(first, steps + 1):
                meter.start()
                for _ in range(gan.n_critic):
                    critic_loss = critic_step(gan, next(batches), gan.sample_latent(gan.batch_size))
                generator_loss = generator_step(gan, gan.sample_latent(gan.batch_size))
                meter.add(step, critic_loss, generator_loss)
                shown.step()

                interrupted = interrupt.requested
                last = interrupted or step == steps
                save = last or step % checkpoint_every == 0
                if save or step % log_every == 0:
                    shown.reading(step, meter.flush(), last=last)
                    if run is not None:
                        run.log(history, sync=save)
                if run is not None and (last or step % sample_every == 0):
                    run.save_samples(gan, step, seed)
                if run is not None and save:
                    run.save(gan, batches, step, seed)
                if interrupted:
                    raise KeyboardInterrupt(f"after step {step} of {steps}")
    return history


@contextlib.contextmanager
def _saying_what_is_saved(run: Run | None) -> Iterator[None]:
    """Add to the errors that end a run early what is left of it."""
    try:
        yield
    except (BlockingIOError, FileExistsError):
        raise
    except (KeyboardInterrupt, OSError) as error:
        saved = run.saved() if run is not None else "nothing was saved"
        kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else WriteError
        raise kind(f"{error}; {saved}" if str(error) else saved) from error


def check_arguments(
    gan: GAN, images: Tensor, steps: int, sample_every: int = 1, checkpoint_every: int = 1, log_every: int = 1
) -> None:
    """Raise ValueError, naming the argument, unless `fit` can train this model on these images."""
    check_positive_int(steps=steps, sample_every=sample_every, checkpoint_every=checkpoint_every, log_every=log_every)
    expected = (gan.channels, gan.image_size, gan.image_size)
    if images.ndim != 4 or images.shape[1:] != expected or images.dtype != torch.float32:
        raise ValueError(
            f"images: expected (N, {', '.join(map(str, expected))}) float32 for this model, "
            f"got {tuple(images.shape)} {images.dtype}"
        )
    if gan.batch_size > len(images):
        raise ValueError(f"batch_size: expected 1 to {len(images)}, the number of images, got {gan.batch_size}")
