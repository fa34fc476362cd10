"""From decoded pixels to the tensors that models train on."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.data.errors import DataError


def to_images(array: np.ndarray, source: str) -> Tensor:
    """Bring an array of images to an (N, C, H, W) tensor: uint8, or float32 in [-1, 1].

    Parameters
    ----------
    array : numpy.ndarray
        (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3. Integers in 0..255, or floats in [0, 1] or [-1, 1].
    source : str
        Where it comes from, for messages.
    """
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 4 or array.shape[1] not in (1, 3):
        raise DataError(
            f"{source}: expected images (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3, "
            f"found shape {array.shape}"
        )
    if array.size == 0:
        raise DataError(f"{source}: expected at least one image, found shape {array.shape}")
    if array.dtype.kind not in "uif":
        raise DataError(f"{source}: expected integers or floats, found dtype {array.dtype}")
    low, high = array.min(), array.max()
    if array.dtype.kind in "ui":
        if low < 0 or high > 255:
            raise DataError(f"{source}: expected integers in 0..255, found {low}..{high}")
        return torch.from_numpy(array.astype(np.uint8, order="C"))
    if not (low >= -1 and high <= 1):
        raise DataError(f"{source}: expected floats in [0, 1] or [-1, 1], found {low:g}..{high:g}")
    images = torch.from_numpy(array.astype(np.float32, order="C"))
    return images if low < 0 else images * 2 - 1


def resize(images: Tensor, image_size: int) -> Tensor:
    """Bring (N, C, H, W) images to (N, C, image_size, image_size).

    Images that fit are padded with black all around. Others are cut to their central square, then scaled down with an
    antialiased bicubic filter, or padded where that square fits.
    """
    height, width = images.shape[2:]
    if max(height, width) > image_size:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        images = images[:, :, top : top + side, left : left + side]
        if side > image_size:
            images = F.interpolate(images, (image_size, image_size), mode="bicubic", antialias=True)
            if images.is_floating_point():
                images = images.clamp(-1, 1)  # bicubic weights overshoot
    down, right = image_size - images.shape[2], image_size - images.shape[3]
    black = -1.0 if images.is_floating_point() else 0.0
    return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2), value=black)


def to_unit_range(images: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [-1, 1]; leave floats as they are."""
    return images if images.is_floating_point() else images.float().div_(127.5).sub_(1)
