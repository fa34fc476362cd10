"""Adapter of the CUDA C++ kernels in csrc/cuda/weight_clip.cu: one launch for a whole list."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from gankern import _cuda
from gankern._cuda import refuse
from gankern.ops.weight_clip import reference
from gankern.ops.weight_clip.flat import all_alike, is_dense, split
from gankern.ops.weight_clip.table import table

__all__ = ["KERNELS", "clip_weights", "refuse", "rmsprop_clip"]

_BLOCK = 256

#: Every specialisation that may be launched.
KERNELS = [
    *(_cuda.kernel("weight_clip", "clip_weights", dtype) for dtype in _cuda.TYPES),
    *(
        _cuda.kernel("weight_clip", "rmsprop_clip", dtype, CENTERED=centered, MOMENTUM=momentum)
        for dtype, centered, momentum in itertools.product(_cuda.TYPES, (0, 1), (0, 1))
    ),
]


def clip_weights(params: list[Tensor], c: float) -> None:
    dense = [p for p in params if is_dense(p) and p.numel()]
    if len(dense) < len(params):
        reference.clip_weights([p for p in params if not is_dense(p)], c)
    if dense:
        found = table([dense])
        kernel = _cuda.kernel("weight_clip", "clip_weights", dense[0].dtype)
        arguments = (found.chunks, found.addresses, found.sizes, float(c))
        _cuda.launch(kernel, len(found.chunks), _BLOCK, *arguments, device=dense[0].device)


def _number(value: float | Tensor) -> tuple[float, Tensor | None]:
    """A number, and the tensor on the device that goes before it."""
    return (0.0, value.to(torch.float64)) if isinstance(value, Tensor) else (float(value), None)


def rmsprop_clip(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: float | Tensor,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    clip: float | Tensor | None,
) -> None:
    lists: list[Any] = [params, grads, square_avgs, grad_avgs, momentum_buffers]
    options: tuple[Any, ...] = (lr, alpha, eps, weight_decay, momentum, maximize, clip)
    if not all_alike(lists):
        lists, others = split(lists)
        reference.rmsprop_clip(*others, *options)
    if not lists[0]:
        return
    found = table([tensors for tensors in lists if tensors])
    first = lists[0][0]
    kernel = _cuda.kernel("weight_clip", "rmsprop_clip", first.dtype, CENTERED=bool(lists[3]), MOMENTUM=bool(lists[4]))
    _cuda.launch(
        kernel,
        len(found.chunks),
        _BLOCK,
        found.chunks,
        found.addresses,
        found.sizes,
        len(lists[0]),
        *_number(lr),
        float(alpha),
        float(eps),
        float(weight_decay),
        float(momentum),
        int(maximize),
        *_number(math.inf if clip is None else clip),
        device=first.device,
    )
