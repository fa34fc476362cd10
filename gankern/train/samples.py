"""Samples of a generator, and the grids they are looked at in."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gankern.models.gan import GAN
from gankern.train.files import replacing


@torch.no_grad()
def sample(gan: GAN, n: int, seed: int = 0) -> Tensor:
    """Generate `n` images in eval mode, (n, C, H, W) in [-1, 1]; torch's global random state is left alone."""
    latent = gan.sample_latent(n, torch.Generator(gan.device).manual_seed(seed))
    training = gan.generator.training
    gan.generator.eval()
    try:
        return torch.cat([gan.generator(part) for part in latent.split(gan.batch_size)])
    finally:
        gan.generator.train(training)


def save_grid(images: Tensor, path: Path | str, *, columns: int | None = None, gap: int = 2) -> None:
    """Write images side by side into one PNG.

    Parameters
    ----------
    images : Tensor
        (N, C, H, W) in [-1, 1], C of 1 or 3.
    path : path
        Its folder is made if it is not there.
    columns : int, optional
        Images a row; by default the grid is about square.
    gap : int
        Black pixels between images.
    """
    path = Path(path)
    n, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels, got {channels}")
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    pixels = F.pad(pixels, (0, gap, 0, gap, 0, 0, 0, rows * columns - n))
    grid = (
        pixels.unflatten(0, (rows, columns))
        .permute(0, 3, 1, 4, 2)
        .reshape(rows * (height + gap), columns * (width + gap), channels)
    )
    array = grid[: -gap or None, : -gap or None].squeeze(2).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")
