"""Memory layouts and types: those that a kernel gets, and tensors brought into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern._autograd import casts


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last where a 4-d tensor is dense in that order, going by the strides where both are; else contiguous."""
    if tensor.dim() != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    # Images of one pixel are dense in both orders, and tell by the strides that no element needs.
    by_strides = tensor.size(1) > 1 and tensor.stride(3) == tensor.size(1)
    return torch.channels_last if by_strides or not tensor.is_contiguous() else torch.contiguous_format


def dense(tensor: Tensor) -> Tensor:
    """The tensor, contiguous or channels_last; copied where it is neither."""
    return tensor.contiguous(memory_format=memory_format(tensor))


def like_layout(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor in the memory order of another of the same shape."""
    return tensor.contiguous(memory_format=memory_format(other))


def turned(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same elements in another order of memory; the tensor itself where it has that."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def autocast(*tensors: Any) -> list[Any]:
    """Casts as autocast would in front of a convolution or matrix product."""
    first = next(t for t in tensors if t is not None)
    if not casts(first):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    return [t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors]


def not_a_view(tensor: Tensor) -> Tensor:
    """The same elements as a tensor of its own, which a Function may return and others may change in place."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
