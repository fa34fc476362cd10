"""Adapter of the C++ kernels in csrc/cpu/weight_clip.cpp: tensors that are dense in memory, walked as flat lists."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from gankern._native import DTYPES, kernels, refuse
from gankern.ops.weight_clip import reference

__all__ = ["clip_weights", "refuse", "rmsprop_clip"]


def _is_dense(tensor: Tensor) -> bool:
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
        and tensor.is_cpu
        and tensor.shape == param.shape
        and ((tensor.is_contiguous() and param.is_contiguous()) or tensor.stride() == param.stride())
    )


def _all_alike(lists: list[list[Tensor]]) -> bool:
    """Whether all tensors are contiguous and like their parameter: the usual case, found out fast."""
    dtype = lists[0][0].dtype
    shapes = [p.shape for p in lists[0]]
    return all([t.is_contiguous() and t.dtype is dtype and t.is_cpu for tensors in lists for t in tensors]) and all(
        [t.shape for t in tensors] == shapes for tensors in lists[1:] if tensors
    )


def _split(lists: list[list[Tensor]]) -> tuple[list[Any], list[Any]]:
    """Rows of the lists that a kernel can walk as flat memory, gradients copied where need be, and the others."""
    params, grads, *states = lists
    grads = list(grads)
    flat = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        flat.append(
            _is_dense(param)
            and grad.shape == param.shape
            and all(_alike(tensors[i], param) for tensors in states if tensors)
        )
        if flat[i] and not _alike(grad, param):
            grads[i] = torch.empty_like(param).copy_(grad)
    lists = [params, grads, *states]
    others = [not f for f in flat]
    return [list(compress(ts, flat)) for ts in lists], [list(compress(ts, others)) for ts in lists]


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def clip_weights(params: list[Tensor], c: float) -> None:
    dense = [p for p in params if p.is_contiguous() or _is_dense(p)]
    if len(dense) < len(params):
        reference.clip_weights([p for p in params if not _is_dense(p)], c)
    sizes = [p.numel() for p in dense]
    kernels.clip_weights(DTYPES[params[0].dtype], sizes, _addresses(dense), c, torch.get_num_threads())


def rmsprop_clip(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    clip: float | None,
) -> None:
    lists: list[Any] = [params, grads, square_avgs, grad_avgs, momentum_buffers]
    options: tuple[Any, ...] = (lr, alpha, eps, weight_decay, momentum, maximize, clip)
    if not _all_alike(lists):
        lists, others = _split(lists)
        reference.rmsprop_clip(*others, *options)
    kernels.rmsprop_clip(
        DTYPES[params[0].dtype],
        [p.numel() for p in lists[0]],
        *map(_addresses, lists),
        *options,
        torch.get_num_threads(),
    )
