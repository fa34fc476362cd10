"""Which calls on a GPU are small, and what it has measured to be the fastest backend of an op, by type and size.

``gankern bench --device cuda --tune`` measures and writes a file for each kind of GPU beside the compiled kernels;
``auto`` goes by it. Another backend may sum up in another order: results have the same bits on every run with the same
table, not across tables.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gankern import _cuda, backends

#: The type of a table's row for float32 where convolutions round to it.
TF32 = "tf32"

#: {op: {dtype: {log2 of the number of elements: backend}}}
Table = Mapping[str, Mapping[str, Mapping[int, str]]]

# An eager call keeps the host busy for longer than stock's does, and the GPU for less. It pays where the GPU, with what
# stock does, is busy for longer than the host with ours. Batch norm + activation, forward and backward: 0.1 ms on the
# host with launches that do nothing, 0.4 on a host of an H200 that is four times as slow; stock reads and writes its
# tensor 13 times, at 4 TB/s.
_HOST_SECONDS, _BYTES_PER_SECOND, _STOCK_PASSES = 0.4e-3, 4e12, 13
#: Bytes of a call's largest tensor below which ``auto`` leaves eager calls on a GPU to torch's own operators. In a CUDA
#: graph the host costs nothing, and kernels run at any size.
FEW_BYTES = round(_HOST_SECONDS * _BYTES_PER_SECOND / _STOCK_PASSES)
#: The ops that this is about.
BY_SIZE = ("batch_norm_act", "conv_transpose2d_bn_act", "conv2d_bn_act", "gradient_penalty")
#: What is told of such a call.
SMALL = f"an eager call of less than {FEW_BYTES >> 20} MiB on a GPU costs more on the host than it saves"

# Handed on by torch to the threads of a backward pass, where a checkpoint runs its part of a model again.
_AS_CAPTURED = "gankern_as_captured"


def _is_as_captured() -> bool:
    return bool(torch._C._is_key_in_tls(_AS_CAPTURED) and torch._C._get_obj_in_tls(_AS_CAPTURED))


@contextmanager
def as_captured() -> Iterator[None]:
    """Run what is in a ``with`` block as in a CUDA graph: before it is captured, that loads its kernels."""
    before = _is_as_captured()
    backends.hand_on(_AS_CAPTURED, True)
    try:
        yield
    finally:
        backends.hand_on(_AS_CAPTURED, before)


def goes_by_size(device: torch.device, *, captured: bool = False) -> bool:
    """Whether small calls on a device are left to torch: by ``auto`` and eagerly on a GPU.

    With `captured`, also in a graph that somebody else than :func:`gankern.capture` captures: nothing of theirs may
    have run before.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or backends.requested() != "auto":
        return False
    return not _is_as_captured() and (captured or not torch.cuda.is_current_stream_capturing())


def is_small(*tensors: Tensor, captured: bool = False) -> bool:
    """Whether a call of one of the ops `BY_SIZE` is left to torch; `captured` as in :func:`goes_by_size`."""
    return goes_by_size(tensors[0].device, captured=captured) and max(t.nbytes for t in tensors) < FEW_BYTES


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
