"""Adapter of the C++ kernels in csrc/cpu/weight_clip.cpp: tensors that are dense in memory, walked as flat lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern._native import DTYPES, kernels, refuse
from gankern.ops.weight_clip import reference
from gankern.ops.weight_clip.flat import all_alike, is_dense, split

__all__ = ["clip_weights", "refuse", "rmsprop_clip"]


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def clip_weights(params: list[Tensor], c: float) -> None:
    dense = [p for p in params if p.is_contiguous() or is_dense(p)]
    if len(dense) < len(params):
        reference.clip_weights([p for p in params if not is_dense(p)], c)
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
    if not all_alike(lists):
        lists, others = split(lists)
        reference.rmsprop_clip(*others, *options)
    kernels.rmsprop_clip(
        DTYPES[params[0].dtype],
        [p.numel() for p in lists[0]],
        *map(_addresses, lists),
        *options,
        torch.get_num_threads(),
    )
