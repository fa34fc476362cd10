"""Lists of tensors as kernels walk them: each as flat memory."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in any order of the dims."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _alike(tensor: Tensor, param: Tensor) -> bool:
    """Whether an element is found at the same place in both tensors' memory."""
    return (
        tensor.dtype == param.dtype
        and tensor.device == param.device
        and tensor.shape == param.shape
        and ((tensor.is_contiguous() and param.is_contiguous()) or tensor.stride() == param.stride())
    )


def all_alike(lists: list[list[Tensor]]) -> bool:
    """Whether all tensors are contiguous and like their parameter: the usual case, found out fast."""
    dtype, device = lists[0][0].dtype, lists[0][0].get_device()
    shapes = [p.shape for p in lists[0]]
    same = [t.is_contiguous() and t.dtype is dtype and t.get_device() == device for tensors in lists for t in tensors]
    return all(same) and all([t.shape for t in tensors] == shapes for tensors in lists[1:] if tensors)


def split(lists: list[list[Tensor]]) -> tuple[list[Any], list[Any]]:
    """Rows of the lists that a kernel can walk as flat memory, gradients copied where need be, and the others."""
    params, grads, *states = lists
    grads = list(grads)
    flat = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        flat.append(
            is_dense(param)
            and grad.shape == param.shape
            and all(_alike(tensors[i], param) for tensors in states if tensors)
        )
        if flat[i] and not _alike(grad, param):
            grads[i] = torch.empty_like(param).copy_(grad)
    lists = [params, grads, *states]
    others = [not f for f in flat]
    return [list(compress(ts, flat)) for ts in lists], [list(compress(ts, others)) for ts in lists]
