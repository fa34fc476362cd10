"""How sums over the samples are cut where there are too few outputs to fill a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern._native import acc_dtype


def cut(n: int, blocks: int, wanted: int, least: int) -> tuple[int, int]:
    """Number of parts and samples in each, but for the last: about the wanted number of blocks in all.

    It follows from the shape alone, so that the bits are the same on every device.
    """
    size = -(-n // max(1, min(-(-wanted // blocks), n // least)))
    return -(-n // size), size


def scratch(output: Tensor, count: int) -> Tensor | None:
    """Room for the parts' sums; None where there is one part, which writes the output."""
    if count == 1:
        return None
    return torch.empty((count, *output.shape), dtype=acc_dtype(output.dtype), device=output.device)


def add_up(output: Tensor, parts: Tensor | None) -> None:
    if parts is not None:
        output.copy_(parts.sum(0))
