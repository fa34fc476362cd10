"""Adapter of the CUDA C++ kernels in csrc/cuda/weight_clip.cu: one launch for up to 72 tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gankern import _cuda
from gankern._cuda import refuse
from gankern.ops.weight_clip import reference
from gankern.ops.weight_clip.flat import all_alike, is_dense, split

__all__ = ["KERNELS", "clip_weights", "refuse", "rmsprop_clip"]

_BLOCK = 256
# As in csrc/cuda/weight_clip.cu: elements that one block walks, and tensors of a launch.
_CHUNK, _MOST = 4096, 72
_LISTS = np.dtype(
    [("at", np.uintp, (5, _MOST)), ("sizes", np.int64, _MOST), ("first", np.int32, _MOST), ("count", np.int32)],
    align=True,
)

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
    for launch, blocks in _launches([dense]):
        kernel = _cuda.kernel("weight_clip", "clip_weights", dense[0].dtype)
        _cuda.launch(kernel, blocks, _BLOCK, launch, float(c), device=dense[0].device)


def _launches(lists: list[list[Tensor]]) -> Iterator[tuple[np.ndarray, int]]:
    """What each launch gets of lists of as many tensors each, alike in size from list to list; and its blocks."""
    for begin in range(0, len(lists[0]), _MOST):
        rows = [tensors[begin : begin + _MOST] for tensors in lists]
        sizes = [t.numel() for t in rows[0]]
        *first, blocks = itertools.accumulate((-(-size // _CHUNK) for size in sizes), initial=0)
        launch, count = np.zeros((), _LISTS), len(sizes)
        launch["at"][: len(rows), :count] = [[t.data_ptr() for t in row] for row in rows]
        launch["sizes"][:count], launch["first"][:count], launch["count"] = sizes, first, count
        yield launch, blocks


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
    first = lists[0][0]
    kernel = _cuda.kernel("weight_clip", "rmsprop_clip", first.dtype, CENTERED=bool(lists[3]), MOMENTUM=bool(lists[4]))
    rate, bound = _number(lr), _number(math.inf if clip is None else clip)
    numbers = (*rate, float(alpha), float(eps), float(weight_decay), float(momentum), int(maximize), *bound)
    for launch, blocks in _launches([tensors for tensors in lists if tensors]):
        _cuda.launch(kernel, blocks, _BLOCK, launch, *numbers, device=first.device)
