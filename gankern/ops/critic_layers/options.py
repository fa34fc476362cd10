"""Arguments that layers share."""

from __future__ import annotations

from typing import Any, NamedTuple


class ConvOptions(NamedTuple):
    """Arguments of ``aten.convolution`` behind the weight and bias."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def ints(value: Any, dims: int) -> list[int]:
    """An option of a convolution or a pooling, one number a dimension."""
    return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)
