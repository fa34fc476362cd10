"""What a GPU has measured to be the fastest backend of an op, by type and size.

``gankern bench --device cuda --tune`` measures and writes a file for each kind of GPU beside the compiled kernels;
``auto`` goes by it. Another backend may sum up in another order: results have the same bits on every run with the same
table, not across tables.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gankern import _cuda, backends

#: The type of a table's row for float32 where convolutions round to it.
TF32 = "tf32"

#: {op: {dtype: {log2 of the number of elements: backend}}}
Table = Mapping[str, Mapping[str, Mapping[int, str]]]


def path(gpu: str) -> Path:
    """The file of a kind of GPU."""
    return _cuda.cache_dir() / f"fastest-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.json"


def key(*tensors: Tensor) -> tuple[str, int]:
    """Type and size by which calls are told apart: those of the largest tensor."""
    largest = max(tensors, key=Tensor.numel)
    return str(largest.dtype).removeprefix("torch."), round(math.log2(max(1, largest.numel())))


def fastest(op: str, *tensors: Tensor) -> str | None:
    """The backend that was fastest at the nearest size that was measured on this GPU; None where none was."""
    if not tensors or tensors[0].device.type != "cuda":
        return None
    types = _of_device(tensors[0].device.index or 0).get(op)
    if types is None:
        return None
    dtype, size = key(*tensors)
    sizes = types.get(TF32, {}) if dtype == "float32" and convolves_in_tf32() else {}
    sizes = sizes or types.get(dtype, {})
    return sizes[min(sizes, key=lambda known: abs(known - size))] if sizes else None


def convolves_in_tf32() -> bool:
    """Whether torch lets convolutions of float32 round their factors to TF32, as it does by default."""
    # Since torch 2.9 by operator; the old flag cannot be read where operators differ.
    by_operator = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if by_operator is None else by_operator.fp32_precision == "tf32"


@cache
def _of_device(index: int) -> Table:
    return load(torch.cuda.get_device_name(index))


def load(gpu: str) -> Table:
    """What was measured on a kind of GPU; empty where nothing was, or the file cannot be read."""
    try:
        found = json.loads(path(gpu).read_text())
        return {op: {d: {int(k): str(v) for k, v in s.items()} for d, s in t.items()} for op, t in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        backends.logger.warning("what was measured in %s cannot be read, auto goes without: %s", path(gpu), error)
        return {}


def save(gpu: str, table: Table) -> Path:
    """Add to what was measured on a kind of GPU, for this process and those to come."""
    known = {op: {dtype: dict(sizes) for dtype, sizes in of.items()} for op, of in load(gpu).items()}
    for op, types in table.items():
        for dtype, sizes in types.items():
            known.setdefault(op, {}).setdefault(dtype, {}).update(sizes)
    file = path(gpu)
    _cuda.write_whole(file, json.dumps(known, indent=1, sort_keys=True).encode())
    _of_device.cache_clear()
    return file
