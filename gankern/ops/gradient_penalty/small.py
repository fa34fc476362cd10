"""Penalties so small that stock autograd, which is C++ throughout, outruns layers that Python calls one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gankern.ops.gradient_penalty.autograd import torch_may_run

# Multiplications of a forward pass that pay for the calls of gankern's layers, measured: for each convolution or linear
# layer, each norm with a weight a channel, and each with a weight a pixel. Linear layers gain less of a product, and
# convolutions of one image, which torch runs by other kernels.
_PER_WEIGHT, _PER_CHANNEL_NORM, _PER_PIXEL_NORM = 2.5e6, 10e6, 38e6
_LINEAR_GAIN, _SINGLE_IMAGE_GAIN = 1 / 6, 1 / 3
# What else a parameter of a linear layer costs stock, in multiplications: passes over memory for its gradient.
_PER_LINEAR_PARAMETER = 3


def is_small(critic: nn.Module, points: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether a critic costs less than calling gankern's layers for it, by an estimate from its trainable parameters.

    It takes images for as large in all layers as at the first. Torch's second derivative of a strided convolution costs
    more than ours at any size.
    """
    if not params or not torch.is_grad_enabled() or not torch_may_run(points):
        return False
    if any(isinstance(m, _ConvNd) and max(m.stride) > 1 for m in critic.modules()):
        return False
    samples, dims = points.size(0), points.dim()
    pixels = samples * points[0, 0].numel() if dims > 2 else 0
    work = 0.0
    weights = vectors = pixel_norms = 0
    for p in params:
        p_dims = p.dim()
        if p_dims == 1:
            vectors += 1
        elif p_dims == 2:
            weights += 1
            work += p.numel() * (samples * _LINEAR_GAIN + _PER_LINEAR_PARAMETER)
        elif p_dims == dims:
            weights += 1
            work += p.numel() * pixels * (1 if samples > 1 else _SINGLE_IMAGE_GAIN)
        else:
            pixel_norms += 1
    # Each weight comes with a bias, each norm with two parameters.
    channel_norms = max(vectors - weights, 0)
    return work < _PER_WEIGHT * weights + (_PER_CHANNEL_NORM * channel_norms + _PER_PIXEL_NORM * pixel_norms) / 2
