"""IDX, the format in which MNIST is published (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from gankern.data.errors import DataError

UBYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path) -> np.ndarray:
    """Read images, (N, H, W) uint8, from an IDX file, gzipped or not."""
    content = path.read_bytes()
    if content.startswith(GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: expected a whole gzip file, found: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(
            f"{path}: expected an IDX file (magic 0x00000803), a .npz file or a folder of images, "
            f"found a file that begins with 0x{content[:4].hex()}"
        )
    kind, ndim = content[2], content[3]
    if kind != UBYTE:
        raise DataError(f"{path}: expected IDX data of unsigned bytes (type 0x08), found type 0x{kind:02x}")
    if ndim != 3:
        hint = ", which holds labels" if ndim == 1 else ""
        raise DataError(f"{path}: expected IDX data of 3 dimensions, images by rows by columns, found {ndim}{hint}")
    start = 4 + 4 * ndim
    if len(content) < start:
        raise DataError(f"{path}: expected an IDX header of {start} bytes, found {len(content)}")
    shape = struct.unpack(">3I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path}: expected {math.prod(shape)} bytes of pixels for shape {shape}, found {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
