"""Arguments that layers share."""

from __future__ import annotations

from typing import Any


def ints(value: Any, dims: int) -> tuple[int, ...]:
    """An option of a convolution or a pooling, one number a dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)
