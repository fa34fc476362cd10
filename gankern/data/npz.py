"""NumPy archives."""

from __future__ import annotations

import math
import warnings
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from gankern._files import open_file, reason
from gankern.data.errors import DataError
from gankern.data.memory import beyond_memory

KEYS = ("images", "x_train", "arr_0")
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: Path) -> np.ndarray:
    """Read the array named in `KEYS`, or the only one, from a .npz file."""
    with open_file(path, DataError, "a .npz archive") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            raise DataError(f"{path}: expected a .npz archive, found a single .npy array")
        where = f"{path}"
        try:
            with zipfile.ZipFile(file) as archive:
                names = [record.filename.removesuffix(".npy") for record in archive.infolist()]
                key = _key(names, path)
                where += f": {key}"
                return _read_array(archive, archive.infolist()[names.index(key)], where)
        except DataError:
            raise
        except Exception as error:  # what a broken file makes zipfile, its codecs and numpy raise has no end
            raise DataError(f"{where}: expected a .npz archive of numbers, found: {reason(error)}") from error


def _read_array(archive: zipfile.ZipFile, record: zipfile.ZipInfo, where: str) -> np.ndarray:
    """Read one array whole, so that its checksum is seen, and no more than it says it has."""
    if record.flag_bits & 1:
        raise DataError(f"{where}: expected an archive without a password, found an encrypted one")
    with archive.open(record) as member:
        version = np.lib.format.read_magic(member)
        if version not in _READ_HEADER:
            raise DataError(f"{where}: expected numbers in .npy format 1.0 or 2.0, found {version[0]}.{version[1]}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 2 wrote other headers, which are read as well
            shape, fortran_order, dtype = _READ_HEADER[version](member)
        if dtype.hasobject:
            raise DataError(f"{where}: expected numbers, found Python objects, which could run code")
        size = math.prod(shape) * dtype.itemsize
        if size != record.file_size - member.tell():
            found = f"found {record.file_size - member.tell()}"
            raise DataError(f"{where}: expected {size} bytes for shape {shape} {dtype}, {found}")
        if too_much := beyond_memory(size):
            raise DataError(f"{where}: expected an array that fits in memory, found {too_much}")
        content = _read(member, size)
    if len(content) != size:
        raise DataError(f"{where}: expected {size} bytes for shape {shape} {dtype}, found {len(content)}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")


def _read(member: IO[bytes], size: int) -> bytes:
    """Up to the end, where the checksum is compared, and one byte too many at most."""
    parts, left = [], size + 1
    while left and (part := member.read(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _key(names: list[str], path: Path) -> str:
    for key in KEYS:
        if key in names:
            return key
    if len(names) == 1:
        return names[0]
    found = ", ".join(names[:9]) or "none"
    raise DataError(f"{path}: expected an array named {', '.join(KEYS)}, or just one array, found {found}")
