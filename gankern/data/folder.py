"""Folders of image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gankern.data.arrays import resize, to_images
from gankern.data.errors import DataError

GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def read_folder(path: Path, image_size: int) -> Tensor:
    """Read all files under a folder, by sorted path, as (N, C, image_size, image_size) uint8.

    C is 1 where every image is grey, else 3. Transparent pixels are laid on white. Every file has to be an image, but
    for hidden ones, whose names begin with a dot.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise DataError(f"{path}: expected a folder of images, found no files in it")
    images = [_read_image(file, image_size) for file in files]
    channels = max(image.shape[1] for image in images)
    return torch.cat([image.expand(-1, channels, -1, -1) for image in images])


def _read_image(path: Path, image_size: int) -> Tensor:
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        found = "something else" if isinstance(error, Image.UnidentifiedImageError) else error
        raise DataError(f"{path}: expected an image that Pillow can read, found: {found}") from error
    if image.mode not in GREY_MODES + COLOUR_MODES:
        raise DataError(f"{path}: expected an image of 8 bits a channel, found mode {image.mode}")
    target = "L" if image.mode in GREY_MODES else "RGB"
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return resize(to_images(np.asarray(image.convert(target))[None], str(path)), image_size)
