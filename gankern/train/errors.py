"""The error of a run's files, and what it shows of them."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern._files import FileError


class CheckpointError(FileError):
    """A file of a run is missing, broken, or of another model."""


def shown(value: object) -> str:
    """A value in at most half a line."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, dict | list | tuple | set | torch.nn.Module):
        return f"a {type(value).__name__}" + (
            f" of {len(value)}" if isinstance(value, dict | list | tuple | set) else ""
        )
    try:
        text = ascii(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} that is too large"
    return text if len(text) <= 60 else text[:57] + "..."
