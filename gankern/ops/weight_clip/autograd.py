"""Operators of weight clipping and of RMSProp with clipping. Nothing is differentiable: both are updates."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from gankern import _autograd, _cuda, _library, _triton, backends
from gankern.ops.weight_clip import cpu, reference

OPS = ("clip_weights_", "rmsprop_clip_")
for _op in OPS:
    backends.register(
        _op,
        cpu=cpu,
        reference=reference,
        triton=_triton.adapter("gankern.ops.weight_clip.triton"),
        cuda=_cuda.adapter("gankern.ops.weight_clip.cuda"),
    )


def _by_kind(params: list[Tensor], *others: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """The lists, cut into groups of one device and dtype; an empty list stays empty."""
    if len({p.dtype for p in params}) == len({p.device for p in params}) == 1:
        yield params, *others
        return
    kinds = [(p.device, p.dtype) for p in params]
    for kind in dict.fromkeys(kinds):
        yield tuple(list(compress(tensors, (k == kind for k in kinds))) for tensors in (params, *others))


def _clip_weights(params: list[Tensor], c: float) -> None:
    _increment_version(params)
    for (group,) in _by_kind(params):
        backends.select("clip_weights_", group[0]).clip_weights(group, c)


def _rmsprop_clip(
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
    lr_tensor: Tensor | None = None,
    clip_tensor: Tensor | None = None,
) -> None:
    _increment_version([*params, *square_avgs, *grad_avgs, *momentum_buffers])
    rate, bound = lr if lr_tensor is None else lr_tensor, clip if clip_tensor is None else clip_tensor
    options = (rate, alpha, eps, weight_decay, momentum, maximize, bound)
    for group in _by_kind(params, grads, square_avgs, grad_avgs, momentum_buffers):
        backends.select("rmsprop_clip_", group[0][0]).rmsprop_clip(*group, *options)


def _increment_version(tensors: list[Tensor]) -> None:
    # Those of inference mode have none.
    increment_version([t for t in tensors if not t.is_inference()] if torch.is_inference_mode_enabled() else tensors)


def clip(params: list[Tensor], c: float) -> None:
    """Clamp by the kernels where they may, else as torch does."""
    if _autograd.is_plain(*params) or _autograd.is_derived():
        clip_weights_(params, c)
        return
    with torch.no_grad():
        reference.clip_weights(params, c)


def _nothing(*args: Any) -> None:
    return None


clip_weights_ = _library.define("clip_weights_(Tensor(a!)[] params, float c) -> ()", _clip_weights, _nothing)
rmsprop_clip_ = _library.define(
    "rmsprop_clip_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] grad_avgs,"
    " Tensor(d!)[] momentum_buffers, float lr, float alpha, float eps, float weight_decay, float momentum,"
    " bool maximize, float? clip, Tensor? lr_tensor=None, Tensor? clip_tensor=None) -> ()",
    _rmsprop_clip,
    _nothing,
)
