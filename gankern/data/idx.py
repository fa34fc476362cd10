"""IDX, the format in which MNIST is published (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from gankern._files import open_file, reason
from gankern.data.errors import DataError
from gankern.data.memory import beyond_memory

UBYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"
#: Deflate packs a run of equal bytes no tighter.
_DEFLATE_RATIO = 1032


def read_idx(path: Path) -> np.ndarray:
    """Read images, (N, H, W) uint8, from an IDX file, gzipped or not."""
    with open_file(path, DataError, "an IDX file") as file:
        is_packed = file.read(2) == GZIP_MAGIC
        room = file.seek(0, io.SEEK_END) * (_DEFLATE_RATIO if is_packed else 1)
        file.seek(0)
        try:
            if is_packed:
                with gzip.GzipFile(fileobj=file) as unpacked:
                    return _read_images(unpacked, path, room)
            return _read_images(file, path, room)
        except (OSError, EOFError, zlib.error) as error:
            kind = "a whole gzip file" if is_packed else "a file that can be read"
            raise DataError(f"{path}: expected {kind}, found: {reason(error)}") from error


def _read_images(file: IO[bytes] | gzip.GzipFile, path: Path, room: int) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(
            f"{path}: expected an IDX file (magic 0x00000803), a .npz file or a folder of images, "
            f"found a file that begins with 0x{magic.hex()}"
        )
    kind, ndim = magic[2], magic[3]
    if kind != UBYTE:
        raise DataError(f"{path}: expected IDX data of unsigned bytes (type 0x08), found type 0x{kind:02x}")
    if ndim != 3:
        hint = ", which holds labels" if ndim == 1 else ""
        raise DataError(f"{path}: expected IDX data of 3 dimensions, images by rows by columns, found {ndim}{hint}")
    sizes = file.read(12)
    if len(sizes) < 12:
        raise DataError(f"{path}: expected an IDX header of 16 bytes, found {4 + len(sizes)}")
    shape = struct.unpack(">3I", sizes)
    expected = f"{path}: expected {math.prod(shape)} bytes of pixels for shape {shape}, found"
    if math.prod(shape) > room:
        raise DataError(f"{expected} a file that cannot hold them")
    if too_much := beyond_memory(math.prod(shape)):
        raise DataError(f"{path}: expected images that fit in memory, found {too_much}")
    # Up to the end, where gzip compares its checksum.
    parts, found = [], 0
    while found <= math.prod(shape) and (part := file.read(1 << 20)):
        found += len(part)
        parts.append(part)
    if found != math.prod(shape):
        raise DataError(f"{expected} {found}")
    return np.frombuffer(b"".join(parts), np.uint8).reshape(shape)
