"""Samples of a generator, and the grids they are looked at in."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gankern._files import make_folder, write_file
from gankern.models.gan import GAN


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
    """Write images side by side into one file, in the format that its suffix names.

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

    Raises
    ------
    ValueError
        If the channels are others, or Pillow cannot write what the suffix names.
    """
    path = Path(path)
    form = image_format(path)
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
    content = io.BytesIO()
    try:
        Image.fromarray(array).save(content, format=form)
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"path: expected a format that holds this image, got {path.suffix}: {error}") from error
    make_folder(path.parent)
    write_file(path, content.getbuffer())


def image_format(path: Path) -> str:
    """Pillow's name of the format that a path's suffix asks for.

    Raises
    ------
    ValueError
        If Pillow writes none of that suffix.
    """
    form = Image.registered_extensions().get(path.suffix.lower())
    if form not in Image.SAVE:
        raise ValueError(f"path: expected the suffix of an image that Pillow writes, such as .png, got {str(path)!r}")
    return form
