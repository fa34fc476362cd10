"""Adapter of the C++ kernels in csrc/cpu/weight_clip.cpp: tensors that are dense in memory, walked as flat lists."""

from __future__ import annotations

import math

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


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def clip_weights(params: list[Tensor], c: float) -> None:
    dense = [p for p in params if _is_dense(p)]
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
    lists = [params, grads, square_avgs, grad_avgs, momentum_buffers]
    rows: list[tuple[Tensor, ...]] = []
    others: list[tuple[Tensor, ...]] = []
    for param, grad, *states in zip(*filter(None, lists), strict=True):
        if not (_is_dense(param) and grad.shape == param.shape and all(_alike(s, param) for s in states)):
            others.append((param, grad, *states))
        elif _alike(grad, param):
            rows.append((param, grad, *states))
        else:
            rows.append((param, torch.empty_like(param).copy_(grad), *states))
