"""Folders of image files."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gankern._files import open_file, reason
from gankern.data.arrays import resize, to_images
from gankern.data.errors import DataError
from gankern.data.memory import beyond_memory

GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def read_folder(path: Path, image_size: int) -> Tensor:
    """Read all images under a folder, by sorted path, as (N, C, image_size, image_size) uint8.

    C is 1 where every image is grey, else 3. Transparent pixels are laid on white. Hidden files, and files whose suffix
    is not that of an image, are skipped, and so are those without a suffix that are none; a line on stderr counts them.
    """
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
    files: list[Path] = []
    skipped: list[Path] = []
    for file in _files_under(path):
        (files if _is_image(file, suffixes) else skipped).append(file)
    if skipped:
        what = "1 file that is no image" if len(skipped) == 1 else f"{len(skipped)} files that are no images"
        logging.getLogger(__name__).warning("%s: skipped %s (%s)", path, what, skipped[0].relative_to(path))
    if not files:
        raise DataError(f"{path}: expected a folder of images, found no {'image ' if skipped else ''}files in it")
    if too_much := beyond_memory(len(files) * image_size**2):
        raise DataError(f"{path}: expected images that fit in memory, found {len(files)}, which need {too_much}")
    images = [_read_image(file, image_size) for file in files]
    channels = max(image.shape[1] for image in images)
    return torch.cat([image.expand(-1, channels, -1, -1) for image in images])


def _is_image(path: Path, suffixes: set[str]) -> bool:
    if path.name.startswith(".") or path.suffix:
        return not path.name.startswith(".") and path.suffix.lower() in suffixes
    with open_file(path, DataError, "an image") as file:
        try:
            Image.open(file).close()
        except Image.UnidentifiedImageError:
            return False
        except Exception:  # told by name when it is read
            return True
    return True


def _files_under(path: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: expected a folder that can be read, found: {error.strerror}") from error

    found, seen = [], set()
    for folder, names, files in os.walk(path, onerror=fail, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        found += [Path(folder) / name for name in files]
    return sorted(found)


def _read_image(path: Path, image_size: int) -> Tensor:
    with open_file(path, DataError, "an image") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of metadata, and of sizes that are not yet an error
                with Image.open(file) as coded:
                    coded.verify()  # the checksums of a PNG, which decoding skips
                file.seek(0)
                with Image.open(file) as coded:
                    image = ImageOps.exif_transpose(coded)
                    image.load()
        except Exception as error:  # what a broken file makes Pillow's decoders raise has no end
            found = "something else" if isinstance(error, Image.UnidentifiedImageError) else reason(error)
            raise DataError(f"{path}: expected an image that Pillow can read, found: {found}") from error
    if image.mode not in GREY_MODES + COLOUR_MODES:
        raise DataError(f"{path}: expected an image of 8 bits a channel, found mode {image.mode}")
    target = "L" if image.mode in GREY_MODES else "RGB"
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return resize(to_images(np.asarray(image.convert(target))[None], str(path)), image_size)
