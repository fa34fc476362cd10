"""The tables in which a GPU's kernels find the tensors of a list, and the pieces of them that blocks walk."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

#: Elements that one block walks.
CHUNK = 4096


class Table(NamedTuple):
    """Tensors of int64 on the device."""

    chunks: Tensor  # (number of chunks, 2): tensor and first element
    addresses: Tensor  # (lists, tensors)
    sizes: Tensor  # (tensors,)
    host: Tensor  # what the others were copied from: a captured graph copies again at each replay


def table(lists: list[list[Tensor]]) -> Table:
    """Of lists of as many tensors each, alike in shape from list to list."""
    addresses = tuple(tuple(t.data_ptr() for t in tensors) for tensors in lists)
    return _table(lists[0][0].device, addresses, tuple(t.numel() for t in lists[0]))


# From one step to the next the same memory mostly comes again: nothing is then copied to the device.
@lru_cache(maxsize=64)
def _table(device: torch.device, addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]) -> Table:
    chunks = [(t, begin) for t, size in enumerate(sizes) for begin in range(0, size, CHUNK)]
    rows = [*(x for chunk in chunks for x in chunk), *(a for row in addresses for a in row), *sizes]
    host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    there = host.to(device, non_blocking=True)
    lengths = [2 * len(chunks), len(addresses) * len(sizes), len(sizes)]
    cut, pointers, numbers = there.split(lengths)
    return Table(cut.view(-1, 2), pointers.view(len(addresses), -1), numbers, host)


@lru_cache(maxsize=64)
def numbers(device: torch.device, *values: float) -> Tensor:
    """Numbers in float64 on the device: as arguments, Triton would round them to float32."""
    host = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
