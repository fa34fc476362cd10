"""NumPy archives."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from gankern.data.errors import DataError

KEYS = ("images", "x_train", "arr_0")


def read_npz(path: Path) -> np.ndarray:
    """Read the array named in `KEYS`, or the only one, from a .npz file."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: expected a .npz archive, found a single .npy array")
            return archive[_key(archive.files, path)]
    except DataError:
        raise
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: expected a .npz archive of numbers, found: {error}") from error


def _key(names: list[str], path: Path) -> str:
    for key in KEYS:
        if key in names:
            return key
    if len(names) == 1:
        return names[0]
    raise DataError(
        f"{path}: expected an array named {', '.join(KEYS)}, or just one array, found {', '.join(names) or 'none'}"
    )
